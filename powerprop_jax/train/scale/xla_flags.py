"""Compiler settings that make the training step faster on a CPU.

They cost nothing elsewhere. XLA reads its flags once, when JAX first touches a
device, so a program sets them before anything else; in a program of your own,
put them into the environment variable XLA_FLAGS.
"""

from collections.abc import MutableMapping
import os

import jaxlib

# Wide vectors halve the cost of roots and powers on processors that have them.
_WIDE_VECTORS = {'--xla_cpu_prefer_vector_width': '512'}

# Loops with several outputs write φ and θ in one pass over the weights (see
# step.make_advance). Where α is an array, and the loop holds a general power,
# they were slower than two passes.
_FUSION = 'xla_cpu_use_multi_output_fusion=true'
_SEVERAL_OUTPUTS = {'--xla_backend_extra_options': _FUSION}

# XLA aborts on flags it does not know, so only versions that were tried get
# them.
_TRIED = ((0, 10), (0, 11))


def set_cpu_flags(
  environment: MutableMapping[str, str], *, static_alpha: bool
) -> None:
  """Adds what is useful to XLA_FLAGS, where the user has not set it.

  Args:
    environment: usually os.environ.
    static_alpha: whether the program trains with an α that is a Python number.

  Example:
    >>> environment = {'XLA_FLAGS': '--xla_cpu_prefer_vector_width=256'}
    >>> set_cpu_flags(environment, static_alpha=True)
    >>> environment['XLA_FLAGS'].count('vector_width')
    1
  """
  version = tuple(int(part) for part in jaxlib.__version__.split('.')[:2])
  if not _TRIED[0] <= version < _TRIED[1]:
    return
  flags = environment.get('XLA_FLAGS', '')
  wanted = _WIDE_VECTORS | (_SEVERAL_OUTPUTS if static_alpha else {})
  for name, value in wanted.items():
    if name not in flags:
      flags = f'{flags} {name}={value}'
  environment['XLA_FLAGS'] = flags.strip()


def fuses_loops() -> bool:
  """Whether steps that run on this machine fuse loops with several outputs.

  Returns:
    True if JAX runs on a CPU, with the setting of set_cpu_flags that does it.
    The question makes JAX choose its devices.
  """
  import jax

  is_set = _FUSION in os.environ.get('XLA_FLAGS', '')
  return is_set and jax.default_backend() == 'cpu'
