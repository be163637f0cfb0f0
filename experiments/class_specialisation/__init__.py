"""Which classes the features of a sparse network serve."""
