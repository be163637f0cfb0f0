"""Many tasks in one network."""
