"""Methods of sparse training compared."""
