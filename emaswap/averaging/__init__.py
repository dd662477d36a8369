"""Averages of weights, and the schedules of their decay. Knows tensors; no file, no store."""
