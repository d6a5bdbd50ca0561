"""The learner: the student, its batches, its optimiser and its weights. Knows no sampler."""
