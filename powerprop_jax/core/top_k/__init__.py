"""Which of many are kept: top-k by counting, by groups, in a whole network."""
