"""What training costs with each method of sparse training, in FLOPs.

Arithmetic on the FLOPs of inference that costs/flops.py counts.
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

METHODS = (
  'dense',
  'static',
  'snip',
  'set',
  'dsr',
  'rigl',
  'snfs',
  'pruning',
  'top_kast',
)


def training_flops(
  method: str,
  dense: float,
  sparse: float | Sequence[float] | None = None,
  *,
  period: int = 100,
  backward: float | None = None,
) -> float:
  """FLOPs of training on one example with one of METHODS, on average.

  With f_D for inference of the dense network and f_S for the sparse one, the
  forward pass is one f; the backward pass is two, one for the gradient of the
  activations and one for that of the weights:

      dense                    3 f_D
      static, snip, set, dsr   3 f_S
      rigl                     (3 f_S ΔT + 2 f_S + f_D) / (ΔT + 1)
      snfs                     2 f_S + f_D
      pruning                  mean of 3 f_t over training
      top_kast                 2 f_A + f_B

  Drawing masks, the loss and the optimiser are not counted, nor is the one
  dense gradient of snip.

  Args:
    sparse: f_S; f_A, that of the forward masks, for 'top_kast'. For 'pruning',
      f_t at equally spaced times, a sequence over all of training. 'dense'
      needs none.
    period: ΔT of 'rigl', steps between updates of the masks, at least 1.
    backward: f_B of 'top_kast', that of the masks of weights that are trained.

  Note:
    The source gives no formula for DSR; it moves connections between layers, so
    f_S here is that of the densities it ends up with. The line for Top-KAST
    follows from its definition.

  Example:
    >>> training_flops('dense', 10.0), training_flops('set', 10.0, 2.0)
    (30.0, 6.0)
    >>> training_flops('rigl', 10.0, 2.0, period=7)
    7.0
    >>> training_flops('pruning', 10.0, [10.0, 6.0, 2.0])
    18.0

  Source:
    Evci et al., Rigging the lottery, 2020, appendix H
    (https://arxiv.org/abs/1911.11134).
  """
  if method not in METHODS:
    raise ValueError(
      f'unknown method {method!r}. There are: {", ".join(METHODS)}.'
    )
  if not 0 < dense < math.inf:
    raise ValueError(f'dense must be a positive number of FLOPs, got {dense}.')
  if method == 'dense':
    return 3 * dense
  if method == 'pruning':
    if not isinstance(sparse, (Sequence, np.ndarray)) or not len(sparse):
      raise ValueError(
        "'pruning' needs the FLOPs over training, a sequence, as sparse; got "
        f'{sparse!r}.'
      )
    steps = [_check_flops('sparse', flops, dense) for flops in sparse]
    return 3 * math.fsum(steps) / len(steps)
  f_s = _check_flops('sparse', sparse, dense)
  if method == 'rigl':
    if period < 1:
      raise ValueError(f'period must be at least 1, got {period}.')
    return (3 * f_s * period + 2 * f_s + dense) / (period + 1)
  if method == 'snfs':
    return 2 * f_s + dense
  if method == 'top_kast':
    return 2 * f_s + _check_flops('backward', backward, dense)
  return 3 * f_s


def _check_flops(name: str, flops: object, dense: float) -> float:
  if not isinstance(flops, (int, float, np.number)):
    raise ValueError(
      f'the method needs {name}, a number of FLOPs, got {flops!r}.'
    )
  if not 0 <= flops <= dense:
    raise ValueError(
      f'{name} must be between 0 and the {dense:g} FLOPs of the dense network, '
      f'got {flops:g}.'
    )
  return float(flops)


def training_multiplier(
  method: str,
  dense: float,
  sparse: float | Sequence[float] | None = None,
  *,
  length: float = 1.0,
  **options: Any,
) -> float:
  """FLOPs of training relative to the dense network for as many steps.

  The arguments are those of training_flops, and the length of training as a
  multiple of that of the dense network, greater than 0.

  Example:
    >>> training_multiplier('set', 10.0, 2.0, length=5)
    1.0
  """
  if not 0 < length < math.inf:
    raise ValueError(f'length must be a positive number, got {length}.')
  flops = training_flops(method, dense, sparse, **options)
  return length * flops / training_flops('dense', dense)
