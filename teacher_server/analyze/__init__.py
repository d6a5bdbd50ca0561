"""Rollouts from anywhere, scored and reported on. Knows no engine and no transport."""
