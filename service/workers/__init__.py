"""Several workers, one copy of the weights: a supervisor follows the store, and its workers answer and flip together."""
