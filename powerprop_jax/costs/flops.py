"""What a network costs, dense and sparse: FLOPs, parameters and bytes.

Arithmetic on the layers of a network and on a sparsity for each leaf, as the
functions of core/distributions.py give it, or on masks:

    costs = layer_costs.layer_costs(net, images)
    sparsities = distributions.erk(theta, 0.9)
    print(flops_table(costs, sparsities))
    ratio = inference_flops(costs, sparsities) / inference_flops(costs)

Convolutions and matrix products are counted, and optionally a bias and a ReLU
after each; normalisation, pooling and the loss are not, as in the figures of
the literature. One FLOP is a multiplication or an addition, so there are about
two to a multiply-add. A sparse network costs what a machine would need that
skips every zero, which says nothing about time.
"""

from collections.abc import Sequence
from fractions import Fraction
import math
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import Tree
from powerprop_jax.costs.layers import LayerCost
from powerprop_jax.files import tables

# {'module/name': sparsity}, or Masks.
Sparsities: TypeAlias = Tree


class Counts(NamedTuple):
  """What a network, or a layer, holds and does for one example."""

  weights: int  # Zeros included.
  nonzeros: float  # Expected.
  biases: int  # Those that are counted.
  multiplications: float
  additions: float

  @property
  def flops(self) -> float:
    """Multiplications and additions."""
    return self.multiplications + self.additions


def layer_counts(
  costs: Sequence[LayerCost],
  sparsities: Sparsities = None,
  *,
  count_bias: bool = True,
  count_relu: bool = True,
) -> list[Counts]:
  """Parameters and operations of each layer, for one example.

  A layer of density d with outputs n and multiply-adds m has d m
  multiplications and d m - n additions; a bias is n further additions, and a
  ReLU n further multiplications.

  Args:
    sparsities: of each leaf that is not dense; or masks. None is the dense
      network.
    count_bias: count a bias for every layer, as RigL does for ResNet-50.
    count_relu: count a ReLU for every layer, the last one included, likewise.

  Note:
    RigL counts this with both flags for ResNet-50, without count_bias for wide
    residual networks, and without count_relu for its networks on MNIST.

  Source:
    Evci et al., Rigging the lottery, 2020, appendix H
    (https://arxiv.org/abs/1911.11134), and google-research,
    micronet_challenge/counting.py.
  """
  found = []
  for cost, density in zip(costs, _densities(costs, sparsities), strict=True):
    is_layer = cost.leaf is not None
    with_bias, with_relu = count_bias and is_layer, count_relu and is_layer
    macs = density * cost.macs
    # Most outputs of a very sparse layer have no input to add.
    additions = macs if with_bias else max(macs - cost.outputs, Fraction(0))
    found.append(
      Counts(
        weights=cost.weights,
        nonzeros=float(density * cost.weights),
        biases=cost.biases if with_bias else 0,
        multiplications=float(macs + cost.outputs if with_relu else macs),
        additions=float(additions),
      )
    )
  return found


def inference_counts(
  costs: Sequence[LayerCost], sparsities: Sparsities = None, **flags: bool
) -> Counts:
  """Sums of layer_counts, with its arguments, over all layers; not rounded.

  Example:
    >>> layer = LayerCost('fc/w', 'linear', (3, 2), 6, 2, 2, 6)
    >>> counts = inference_counts([layer], {'fc/w': 0.5}, count_relu=False)
    >>> counts.nonzeros, counts.multiplications, counts.additions
    (3.0, 3.0, 3.0)
  """
  return _total(layer_counts(costs, sparsities, **flags))


def _total(counts: Sequence[Counts]) -> Counts:
  weights, nonzeros, biases, *rest = zip(_NOTHING, *counts, strict=True)
  return Counts(
    sum(weights), math.fsum(nonzeros), sum(biases), *map(math.fsum, rest)
  )


_NOTHING = Counts(0, 0.0, 0, 0.0, 0.0)


def _densities(
  costs: Sequence[LayerCost], sparsities: Sparsities
) -> list[Fraction]:
  """Density of each layer, in fractions: 1 - 0.9 is 0.1."""
  shapes = {cost.leaf: cost.shape for cost in costs if cost.leaf is not None}
  densities = {}
  for leaf in trees.named_leaves(sparsities):
    value, name = np.asarray(leaf.value), leaf.path
    if value.dtype == bool:
      if name in shapes and value.shape != shapes[name]:
        raise ValueError(
          f'the mask of {name} has shape {value.shape}, the weight has '
          f'{shapes[name]}.'
        )
      density = Fraction(int(np.count_nonzero(value)), max(value.size, 1))
      is_dense = bool(value.all())
    elif value.ndim == 0:
      masks_lib.check_sparsity(value.item(), f'the sparsity of {name}')
      density = 1 - Fraction(str(value[()]))
      is_dense = density == 1
    else:
      raise ValueError(
        f'{name} must be a sparsity or a mask of booleans, got an array of '
        f'{value.dtype} of shape {value.shape}.'
      )
    if name not in shapes and not is_dense:
      raise ValueError(
        f'{name} is no layer: no product uses it, so its zeros cannot be '
        f'counted. The layers are: {", ".join(shapes) or "(none)"}.'
      )
    densities[name] = density
  return [densities.get(cost.leaf or '', Fraction(1)) for cost in costs]


def inference_flops(
  costs: Sequence[LayerCost], sparsities: Sparsities = None, **flags: bool
) -> float:
  """FLOPs of one example: multiplications and additions of inference_counts.

  The arguments are those of layer_counts; the number is not rounded.

  Example:
    >>> layer = LayerCost('fc/w', 'linear', (3, 2), 6, 2, 2, 6)
    >>> inference_flops([layer])
    14.0
  """
  return inference_counts(costs, sparsities, **flags).flops


def model_bytes(
  costs: Sequence[LayerCost],
  sparsities: Sparsities = None,
  *,
  count_bias: bool = True,
) -> float:
  """Bytes of a stored network: 32 bits a value and 1 bit an entry of a mask.

  The arguments are those of layer_counts; the number is not rounded. A
  dense leaf needs no mask.

  Example:
    >>> layer = LayerCost('fc/w', 'linear', (4, 2), 8, 2, 2, 8)
    >>> model_bytes([layer]), model_bytes([layer], {'fc/w': 0.5})
    (40.0, 25.0)
  """
  counts = inference_counts(costs, sparsities, count_bias=count_bias)
  densities = _densities(costs, sparsities)
  mask_bits = sum(
    cost.weights
    for cost, density in zip(costs, densities, strict=True)
    if density < 1
  )
  return 4 * (counts.nonzeros + counts.biases) + mask_bits / 8


def flops_rows(
  costs: Sequence[LayerCost], sparsities: Sparsities = None, **flags: bool
) -> list[tables.Row]:
  """One row per layer and one for all of them, for tables.

  The arguments are those of layer_counts.

  Returns:
    Rows with the keys leaf, kind, shape, weights, sparsity, kept, macs (of the
    sparse layer) and flops; the last row is called 'total'. Counts are rounded.

  Example:
    >>> layer = LayerCost('fc/w', 'linear', (4, 2), 8, 2, 2, 8)
    >>> flops_rows([layer], {'fc/w': 0.5})[-1]['flops']
    10
  """
  counts = layer_counts(costs, sparsities, **flags)
  rows, macs = [], []
  densities = _densities(costs, sparsities)
  for cost, density, count in zip(costs, densities, counts, strict=True):
    macs.append(density * cost.macs)
    shape = '×'.join(map(str, cost.shape))
    name = cost.leaf or 'activations'
    rows.append(_row(name, cost.kind, shape, macs[-1], count))
  return [*rows, _row('total', '', '', sum(macs), _total(counts))]


def _row(
  name: str, kind: str, shape: str, macs: Fraction | int, counts: Counts
) -> tables.Row:
  sparse = 1 - counts.nonzeros / counts.weights if counts.weights else None
  return {
    'leaf': name,
    'kind': kind,
    'shape': shape,
    'weights': counts.weights,
    'sparsity': sparse,
    'kept': round(counts.nonzeros),
    'macs': round(macs),
    'flops': round(counts.flops),
  }


def flops_table(costs: Sequence[LayerCost], *args: Any, **kwargs: Any) -> str:
  """The rows of flops_rows as aligned plain text; the same arguments.

  Example:
    >>> layer = LayerCost('fc/w', 'linear', (4, 2), 8, 2, 2, 8)
    >>> print(flops_table([layer], {'fc/w': 0.5}))
    leaf   kind    shape  weights  sparsity  kept  macs  flops
    fc/w   linear  4×2          8       0.5     4     4     10
    total                       8       0.5     4     4     10
  """
  return tables.text_table(flops_rows(costs, *args, **kwargs))
