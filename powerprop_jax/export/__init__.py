"""A network in one file, and running it."""
