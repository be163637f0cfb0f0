"""One program for each figure, table or benchmark."""

import sys

from powerprop_jax.files import extras

# While Python looks for the program of python -m experiments.…, before it
# imports that; see sys.argv in Python's manual.
if sys.argv[:1] == ['-m']:
  extras.check_for_program()
