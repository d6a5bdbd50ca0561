"""Reports: one HTML file with everything in it, from the steps of runs and from scored rollouts.

No script, nothing fetched, readable in light and dark. Knows neither trainer nor server.
"""
