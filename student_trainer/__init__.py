"""The student trainer: generates, streams to a teacher, stops drifted rollouts, learns."""

__version__ = "0.1.0"
