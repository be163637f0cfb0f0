"""Starts many runs of a program: on this machine, by Slurm, or by submitit.

    processes        so many at a time on this machine
    slurm            writes a script that is an array of Slurm jobs
    submitit_jobs    hands the runs to submitit

All three read the same file, which says what to run (see sweeps.py), and start
the same command lines:

    python -m experiments.launch.processes SWEEP.json --workers 4
    python -m experiments.launch.slurm SWEEP.json
    python -m experiments.launch.submitit_jobs SWEEP.json --wait

Each run has a folder of its own. The same command again, with whichever of the
three, leaves out what is complete and continues what is not.
"""
