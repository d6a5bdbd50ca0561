"""What a step's rollouts say about drift, waste and time, and which of it is worth a warning.

Pure numpy; the loop reports it. Every metric is explained in docs/diagnostics.md.
"""
