"""States on disk: saved, checked, restored."""
