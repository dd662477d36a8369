"""From an average that trains on to a version in a store."""
