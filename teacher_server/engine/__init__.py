"""Scoring engines: vLLM (default), transformers (the reference) and a deterministic fake."""
