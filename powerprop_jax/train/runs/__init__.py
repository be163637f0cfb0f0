"""Folders of runs: what they hold, and what was measured."""
