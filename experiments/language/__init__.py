"""Sparse language models; see __main__.py."""
