"""Settings: what can be written in a configuration, checked before anything starts. No torch."""
