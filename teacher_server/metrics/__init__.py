"""Counts and gauges of one server, for Prometheus."""
