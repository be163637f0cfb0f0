"""SynFlow: scores without data, from a network whose weights are all positive.

R is the sum of the outputs of the network with |θ| in place of θ, for an input
of ones. In a chain of layers each layer's scores |θ| ∂R/∂|θ| add up to the same
number, so that small layers have large scores and are not emptied.
"""

from collections.abc import Callable, Sequence
import contextlib
import functools
import math

import jax
import jax.numpy as jnp

from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.core.trees import NamedLeaf, Params, Select, Tree
from powerprop_jax.prune.at_init import from_scores

# Slopes this much below 0, relative to the largest, are rounding errors.
_TOLERANCE = 1e-6


def synflow(
  apply_fn: Callable[[Params, jax.Array], jax.Array],
  theta: Params,
  input_shape: Sequence[int],
  *,
  select: Select = select_lib.is_weight,
) -> Tree:
  """|θ| ∂R/∂|θ|, how much of the flow through the network a weight carries.

  For a network that is monotone in its weights once they are positive: linear
  and convolutional layers, ReLUs, pooling, shortcuts. All parameters count with
  their absolute values, the scales and offsets of norms too, not only those
  that select chooses. Norms must not subtract a mean or divide by batch
  statistics: evaluate, with the state that neutral_norm_state makes, in which
  each norm is the identity:

      net_state = neutral_norm_state(net_state)
      apply_fn = lambda theta, x: net.apply(theta, net_state, None, x, False)[0]

  R grows exponentially with depth, for a ResNet-50 beyond float32. So it is
  computed in float64, and the scores are divided by the largest. Inside jit,
  where that is not possible, JAX takes the precision that it has there.

  Args:
    apply_fn: (theta, images) -> outputs, without randomness. Build it once:
      programs are compiled again for every new one.
    input_shape: shape of the input, such as (1, 28, 28, 1).

  Returns:
    float32 scores like theta in [0, 1], the largest being 1.

  Raises:
    ValueError: if a slope ∂R/∂|θ| is negative, as the network has parts that
      depend on signs, or if R is not finite or all scores are 0 (none of it is
      checked inside jit).

  Example:
    >>> apply_fn = lambda theta, x: jax.nn.relu(x @ theta['a']['w']) @ theta[
    ...     'b']['w']
    >>> theta = {'a': {'w': jnp.array([[1., -2.]])},
    ...          'b': {'w': jnp.array([[4.], [1.]])}}
    >>> scores = synflow(apply_fn, theta, (1, 1))
    >>> scores['a']['w']
    Array([[1. , 0.5]], dtype=float32)
    >>> scores['b']['w']
    Array([[1. ],
           [0.5]], dtype=float32)

  Source:
    Tanaka et al., Pruning neural networks without any data by iteratively
    conserving synaptic flow, 2020, algorithm 1
    (https://arxiv.org/abs/2006.05467).
  """
  # float64 cannot be switched on in the middle of a trace.
  traced = trees.is_traced(theta)
  with contextlib.nullcontext() if traced else jax.enable_x64(True):
    scores, flow, lowest = _flow(apply_fn, theta, tuple(input_shape), select)
  if traced:
    return scores
  if not math.isfinite(flow):
    raise ValueError(
      f'the flow through the network, R, is {float(flow)}. If a norm divides '
      'by statistics, evaluate with neutral_norm_state; if the network is '
      'extremely deep, scale its weights down.'
    )
  for path, slope in lowest.items():
    if float(slope) < -_TOLERANCE:
      raise ValueError(
        f'a weight of {path!r} lowers the outputs as its absolute value '
        'grows. SynFlow needs a network without parts that depend on signs: '
        'evaluate norms with neutral_norm_state, leave out a softmax, and take '
        'the network without cosine transforms.'
      )
  from_scores.check_scores(scores, 'SynFlow', select)
  return scores


def neutral_norm_state(net_state: Tree) -> Tree:
  """The state of a network with mean 0 and variance 1 in every batch norm.

  Before the first step of training the running statistics of Haiku's BatchNorm
  are all 0, and it divides by the square root of its epsilon. With these, it is
  the identity up to epsilon, its scale and its offset: the averages of each
  'mean_ema' are 0 and of each 'var_ema' 1. All else is unchanged.

  Example:
    >>> state = {'norm/~/var_ema': {'average': jnp.zeros(2)}}
    >>> neutral_norm_state(state)['norm/~/var_ema']['average']
    Array([1., 1.], dtype=float32)
  """

  def visit(leaf: NamedLeaf) -> jax.Array:
    value: jax.Array = leaf.value
    kind = leaf.module_name.rpartition('/')[2]
    if leaf.name != 'average' or kind not in ('mean_ema', 'var_ema'):
      return value
    return jnp.full_like(value, 0.0 if kind == 'mean_ema' else 1.0)

  return trees.map_leaves(visit, net_state)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _flow(
  apply_fn: Callable[[Params, jax.Array], jax.Array],
  theta: Params,
  input_shape: tuple[int, ...],
  select: Select,
) -> tuple[Tree, jax.Array, dict[str, jax.Array]]:
  """Scores, R, and the lowest slope of each leaf relative to its largest."""
  dtype = jnp.result_type(float)
  magnitudes = jax.tree.map(lambda t: jnp.abs(t.astype(dtype)), theta)

  def total(magnitudes: Params) -> jax.Array:
    outputs = apply_fn(magnitudes, jnp.ones(input_shape, dtype))
    if not isinstance(outputs, jax.Array):
      raise TypeError(
        'apply_fn must return the outputs of the network as one array, got a '
        f'{type(outputs).__name__}. If it returns (outputs, net_state), take '
        'the first.'
      )
    return jnp.sum(outputs)

  flow, slopes = jax.value_and_grad(total)(magnitudes)
  names = select_lib.selected_names(select, theta)
  chosen = {
    leaf.path: (leaf.value * slope, jnp.max(jnp.abs(slope)), jnp.min(slope))
    for leaf, slope in zip(
      trees.named_leaves(magnitudes), jax.tree.leaves(slopes), strict=True
    )
    if leaf.path in names and leaf.value.size
  }
  largest = functools.reduce(
    jnp.maximum, [jnp.max(jnp.abs(s)) for s, _, _ in chosen.values()]
  )

  def score_of(leaf: NamedLeaf) -> jax.Array:
    if leaf.path not in chosen:
      return jnp.zeros_like(leaf.value, jnp.float32)
    return (chosen[leaf.path][0] / _or_one(largest)).astype(jnp.float32)

  lowest = {path: low / _or_one(top) for path, (_, top, low) in chosen.items()}
  return trees.map_leaves(score_of, theta), flow, lowest


def _or_one(x: jax.Array) -> jax.Array:
  return jnp.where(x > 0, x, jnp.ones_like(x))
