"""Pruning procedures that live outside a train step."""
