"""What a JAX function multiplies: the walk of its jaxpr."""
