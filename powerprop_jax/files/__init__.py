"""What reaches the disk whole or not at all, and what must be installed."""
