"""Arrays and trees in, arrays and trees out: no state, no optimiser."""
