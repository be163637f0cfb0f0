"""Neuron ablation: which neurons of a constant fan-in layer go, which stay."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from powerprop_jax.core.top_k import topk
from powerprop_jax.core.top_k.patterns import CONSTANT_FAN_IN
from powerprop_jax.core.trees import Select
from powerprop_jax.optim.topologies import counts as counts_lib


@dataclasses.dataclass(frozen=True)
class Ablation:
  """When a neuron loses all of its inputs, and others take them over.

  At a rewiring of a layer of N = k n_out connections that drops K of them, a
  weight is salient if it is among the connections that are kept, or among the
  K largest gradients of those that do not exist. A neuron with fewer than
  max(1, γ k) salient weights is removed: all of its inputs go. The others
  then have floor(N / neurons left) inputs each, so that the layer keeps its
  connections but for the rounding.

  As many neurons stay as can hold N connections with n_in inputs each, at least
  one, those with the most salient weights and of equal ones the first. k, N and
  n_out are those of the layer at the start, so that nothing wears away.

  A removed neuron returns at a later rewiring if its gradients make it salient,
  and the others then give inputs back. Where connections grow at random, as in
  SET, growth is no merit: only what is kept is salient, and what is removed
  stays away. A removed neuron still has its bias and its outputs to the next
  layer.

  Attributes:
    select: leaves whose neurons may be removed, of those that the topology
      masks. Leave the last layer out, for every output of the network has to
      exist: select.exclude(select.is_weight, 'logits'), with what yours is
      called. Leave out layers too whose outputs are added to others' (the ends
      of residual branches) if every channel shall have inputs.
    min_salient: γ, in (0, 1].

  Note:
    The code of the authors ranks the gradients of all weights, those that exist
    included, and rounds γ k down; their k can also be n_in.

  Example:
    >>> hidden = pp.exclude(pp.is_weight, 'logits')
    >>> tx = pp.rigl(optax.sgd(0.1), 0.99, stop=7_500,
    ...              structure='constant_fan_in', ablation=Ablation(hidden))

  Source:
    Lasby et al., as for aliases.rigl, where γ is γ_sal. Read in their code and
    not in the paper: that enough neurons stay, that they may return, and that
    the connections of removed neurons are the first to be dropped.
  """

  select: Select
  min_salient: float = 0.3

  def __post_init__(self) -> None:
    if not 0 < self.min_salient <= 1:
      raise ValueError(
        f'min_salient must be in (0, 1], got {self.min_salient}. For no '
        'ablation, pass ablation=None.'
      )

  def fan_ins_left(
    self,
    mask: jax.Array,
    drop_scores: jax.Array,
    grow_scores: jax.Array | None,
    num_dropped: jax.Array,
    fan_in: int,
  ) -> jax.Array:
    """How many inputs each neuron of a layer gets after ablation.

    Args:
      mask: the connections of the layer, booleans [..., neurons]; the scores
        are floats of that shape.
      grow_scores: by which missing weights are salient; None if they never are.
      num_dropped: K, int32 scalar.
      fan_in: k of the layer without ablation.

    Returns:
      int32 [neurons]; 0 for those removed, the same number for all others.

    Example:
      >>> mask = jnp.array([[True, True], [True, True], [False, False]])
      >>> magnitude = jnp.array([[5., 1.], [4., 2.], [0., 0.]])
      >>> ablation = Ablation(pp.is_weight)
      >>> ablation.fan_ins_left(mask, magnitude, None, jnp.array(2), 1)
      Array([2, 0], dtype=int32)
    """
    kept = topk.top_k_mask(
      drop_scores, counts_lib.num_active(mask) - num_dropped, among=mask
    )
    salient = kept
    if grow_scores is not None:
      salient = kept | topk.top_k_mask(grow_scores, num_dropped, among=~mask)
    counts = CONSTANT_FAN_IN.num_active(salient)
    neurons, size = CONSTANT_FAN_IN.groups(mask.shape)
    total = fan_in * neurons
    stays = counts >= self.least_salient(fan_in)
    num_least = -(-total // size)
    stays |= topk.top_k_mask(counts.astype(jnp.float32), num_least)
    left = total // counts_lib.num_active(stays)
    return jnp.where(stays, left, 0)

  def least_salient(self, fan_in: int) -> int:
    """max(1, γ k), rounded up to a number of weights."""
    # Rounded first, for a product such as 0.1 · 30 may come out above 3.
    return max(1, math.ceil(round(self.min_salient * fan_in, 6)))
