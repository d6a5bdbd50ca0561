"""The learner: the student, its batches, its optimiser and its checkpoints. Knows no sampler."""
