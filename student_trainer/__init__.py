"""The student trainer: generates, streams to a teacher, stops drifted rollouts, learns."""
