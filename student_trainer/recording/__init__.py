"""What a run writes down, and what is drawn from it."""
