"""Who else is told a run's figures: one small protocol, one class a tracker, one sink for all."""
