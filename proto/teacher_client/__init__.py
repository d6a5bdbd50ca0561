"""A teacher's client: sessions that survive broken streams, over several replicas. No torch."""
