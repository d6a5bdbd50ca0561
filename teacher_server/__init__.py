"""The teacher server: scores a student's tokens while they are being generated."""

__version__ = "0.1.0"
