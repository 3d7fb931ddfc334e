"""From samples to a decision: record -> baseline -> verdict -> report. Knows nothing of FP4, torch or pytest."""
