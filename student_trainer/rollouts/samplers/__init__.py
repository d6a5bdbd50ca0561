"""Samplers: vLLM (default) and transformers (the reference)."""
