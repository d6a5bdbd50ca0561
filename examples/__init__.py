"""Runnable examples for driftline."""
