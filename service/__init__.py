"""The FastAPI application: it watches a store, proves each new version right, swaps it in, and answers with it."""
