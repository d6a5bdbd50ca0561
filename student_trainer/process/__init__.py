"""One trainer process from start to end: how it is stopped, and what is said of its failures."""
