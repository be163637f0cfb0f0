"""How powers change the distribution of weights."""
