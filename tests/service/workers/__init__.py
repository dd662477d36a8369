"""Tests of several workers, as processes."""
