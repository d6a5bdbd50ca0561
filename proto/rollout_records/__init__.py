"""Recorded rollouts: one Parquet file a step, their columns, how they are written and read.

Knows neither trainer nor server: both, and any notebook, read the same files.
"""
