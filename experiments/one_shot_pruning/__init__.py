"""Accuracy of networks pruned once, against sparsity."""
