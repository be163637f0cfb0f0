"""Starts many runs of a program, on this machine or by Slurm; see __main__."""
