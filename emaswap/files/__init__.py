"""Bytes in files: digests, durable writes, tensors, nested states. Knows no version."""
