"""The training application: it trains with `ModelEMA` and writes versions to a store."""
