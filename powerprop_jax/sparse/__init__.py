"""Weights without their zeros: index, products, kernels."""
