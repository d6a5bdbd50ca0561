"""What each core does while the trainer takes a step: `python -m benchmarks.trainer_profile`."""
