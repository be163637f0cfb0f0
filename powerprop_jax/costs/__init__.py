"""Parameters, multiply-adds and bytes, dense and sparse."""
