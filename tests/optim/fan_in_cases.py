"""Parameters, runs and slow oracles for the tests of constant fan-in."""

import chex
import numpy as np
import small

import powerprop_jax as pp

UNIFORM = {'distribution': pp.uniform}
# Neurons of the leaves 'w' of theta().
NEURONS = {'conv': 6, 'linear': 12, 'logits': 4}


def theta():
  """A kernel of fan-in 18, a layer of fan-in 20, and one of fan-in 12."""
  shapes = {'conv': (3, 3, 2, 6), 'linear': (20, 12), 'logits': (12, 4)}
  return small.normal({n: {'w': s, 'b': s[-1:]} for n, s in shapes.items()})


def states(tx, num_steps):
  """Sparse states at the start and after each of some random updates."""
  entries = small.history(tx, theta(), num_steps)
  chex.assert_tree_all_finite([phi for phi, _ in entries])
  return [state for _, state in entries]


def inputs(masks, name):
  """Number of inputs of each neuron of the weight of one module."""
  mask = np.asarray(masks[name]['w'])
  return mask.reshape(-1, mask.shape[-1]).sum(0)


def layer(rng):
  """A random layer with ties: (mask, drop scores, grow scores, fan-in)."""
  shape = (
    (rng.integers(1, 12), rng.integers(1, 9)),
    (3, 2, rng.integers(1, 4), rng.integers(1, 7)),
    (1, rng.integers(1, 9)),
    (rng.integers(1, 12), 1),
  )[rng.integers(4)]
  size = int(np.prod(shape[:-1]))
  fan_in = int(rng.integers(1, size + 1))
  order = np.argsort(rng.random((size, shape[-1])), axis=0)
  mask = (order < fan_in).reshape(shape)
  drop = rng.integers(0, 5, shape).astype(np.float32)
  grow = rng.integers(0, 4, shape).astype(np.float32)
  return mask, drop, grow, fan_in


def best(scores, eligible, count):
  """The count best of some flat indices, ties to the lowest."""
  return sorted(np.flatnonzero(eligible), key=lambda i: (-scores[i], i))[:count]


def drop_and_grow(mask, drop, grow, num_dropped, fan_ins):
  """Neuron by neuron, weight by weight."""
  columns = mask.shape[-1]
  staying = mask & (np.asarray(fan_ins) > 0)
  num_kept = max(int(mask.sum()) - num_dropped, 0)
  kept = np.zeros(mask.size, bool)
  kept[best(drop.ravel(), staying.ravel(), num_kept)] = True
  kept = kept.reshape(-1, columns)
  new = np.zeros_like(kept)
  drop, grow = drop.reshape(-1, columns), grow.reshape(-1, columns)
  for j, fan_in in enumerate(fan_ins):
    new[best(drop[:, j], kept[:, j], fan_in), j] = True
    missing = fan_in - int(new[:, j].sum())
    new[best(grow[:, j], ~new[:, j], missing), j] = True
  return new.reshape(mask.shape)
