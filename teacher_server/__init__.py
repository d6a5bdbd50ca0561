"""The teacher server: scores a student's tokens while they are being generated."""
