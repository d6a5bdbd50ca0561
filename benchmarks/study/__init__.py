"""What each method of the four papers is worth on the playground: `python -m benchmarks.study`."""
