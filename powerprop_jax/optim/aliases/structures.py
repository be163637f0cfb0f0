"""What the connections of a neuron may look like, as the aliases are told."""

from typing import Literal, get_args

from powerprop_jax.core import names

# 'constant_fan_in': every neuron of a layer has the same number of inputs.
Structure = Literal['unstructured', 'constant_fan_in']


def is_constant_fan_in(structure: Structure) -> bool:
  """Whether it is 'constant_fan_in'.

  Args:
    structure: the structure.

  Returns:
    True for 'constant_fan_in', False for 'unstructured'.

  Raises:
    ValueError: if it is neither.

  Example:
    >>> is_constant_fan_in('constant_fan_in')
    True
    >>> is_constant_fan_in('constant_fanin')
    Traceback (most recent call last):
      ...
    ValueError: structure must be 'unstructured' or 'constant_fan_in', got \
'constant_fanin'. Did you mean 'constant_fan_in'?
  """
  known = get_args(Structure)
  if structure not in known:
    hint = names.hint(str(structure), known)
    raise ValueError(
      "structure must be 'unstructured' or 'constant_fan_in', got "
      f'{structure!r}.{hint}'
    )
  return structure == 'constant_fan_in'
