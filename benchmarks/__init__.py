"""Benchmarks: speed and memory as ratios within one run. Never run two at once, nor anything else beside one."""
