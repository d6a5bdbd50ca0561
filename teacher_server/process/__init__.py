"""One server process from start to end: loading, serving, watching, draining."""
