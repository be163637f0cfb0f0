"""Published costs of sparse networks, computed again."""
