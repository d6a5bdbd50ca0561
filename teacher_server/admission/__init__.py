"""Whose turn it is at the engine, and how much each tenant may have."""
