"""The HTTP side: health, metrics, one-shot scoring, analysis, a page. No grpc."""
