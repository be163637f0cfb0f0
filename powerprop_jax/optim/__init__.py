"""Optax transformations over latent parameters, and views of their state."""
