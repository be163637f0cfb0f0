"""A training program: data, steps, loop, checkpoints, command line."""
