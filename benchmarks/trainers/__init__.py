"""TRL's distillation trainer and ours, step by step, on the same work."""
