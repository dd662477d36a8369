"""Answers: the live servable and the batches that run through it. Knows no store and no HTTP."""
