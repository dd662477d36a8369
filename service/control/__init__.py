"""Which version is live: watching, deciding, loading. Knows no HTTP and no batch."""
