"""A controller that chooses the power while a network trains."""
