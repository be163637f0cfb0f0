"""A cosine transform plus sparse weights."""
