"""Masks that never change: given ones, or random ones drawn once."""

from typing import Unpack

import jax
import jax.numpy as jnp

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.distributions import Sparsity
from powerprop_jax.core.masks import Masks
from powerprop_jax.core.trees import Params
from powerprop_jax.optim.topologies.counts import (
  Budget,
  Patterned,
  check_options,
)
from powerprop_jax.optim.topology import Topology


def given(masks: Masks) -> Topology:
  """Trains the connections of the given masks, from the first step to the last.

  For pruning at initialisation and for retraining what pruning left. Masks that
  do not have the shapes of the parameters are refused by init.

  Example:
    >>> topology = given({'w': jnp.array([True, False])})
    >>> topology.init(jax.random.key(0), {'w': jnp.ones(2)})[0]['w']
    Array([ True, False], dtype=bool)
  """
  masks_lib.check_boolean(masks)

  def init(key: jax.Array, theta: Params) -> tuple[Masks, tuple[()]]:
    del key
    if not jax.tree.leaves(theta):
      return theta, ()
    masks_lib.check_same_shapes(theta, masks, 'the parameters', 'the masks')
    # A copy: the state may be donated, the caller's masks must survive.
    return jax.tree.map(lambda m: jnp.array(m, copy=True), masks), ()

  return Topology(init, regrow='zero')


def at_random(sparsity: Sparsity, **leaves: Unpack[Patterned]) -> Topology:
  """Random masks, drawn once: the baseline of every method that rewires.

  The number of connections per leaf, or per neuron, is exact.

  Source:
    "Static" in Evci et al., Rigging the lottery, 2020, section 3
    (https://arxiv.org/abs/1911.11134).
  """
  check_options(leaves, Patterned)
  budget = Budget(sparsity, **leaves)
  return Topology(
    lambda key, theta: (budget.random_masks(key, theta), ()), regrow='zero'
  )
