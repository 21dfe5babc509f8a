"""Studies of a model: what FP4 costs in accuracy, what it does to latency."""
