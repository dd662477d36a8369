"""The training application: trains with `ModelEMA` and publishes versions to a store."""
