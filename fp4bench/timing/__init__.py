"""Seconds and the state of the machine they were taken on. Knows nothing of FP4."""
