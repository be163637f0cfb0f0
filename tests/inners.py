"""The optimisers that transformations are tried around."""

import optax
import pytest

from powerprop_jax.optim import powerprop

_WEIGHTS = lambda tree: {'m': {'w': True, 'b': False}, 'n': {'w': True}}

INNERS = {
  'sgd': lambda: optax.sgd(0.05),
  'momentum': lambda: optax.sgd(0.05, momentum=0.9, nesterov=True),
  'adam': lambda: optax.adam(0.01),
  'adamw': lambda: optax.adamw(0.01, weight_decay=0.1),
  'lion': lambda: optax.lion(0.01),
  'adafactor': lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
  'muon': lambda: optax.contrib.muon(0.01),
  'sm3': lambda: optax.sm3(0.05),
  'partition': lambda: optax.partition(
    {'weight': optax.adam(0.01), 'other': optax.sgd(0.05)},
    {'m': {'w': 'weight', 'b': 'other'}, 'n': {'w': 'weight'}},
  ),
  'masked_chain': lambda: optax.chain(
    optax.masked(optax.add_decayed_weights(1e-3), _WEIGHTS),
    optax.clip_by_global_norm(1.0),
    optax.sgd(optax.cosine_decay_schedule(0.05, 100), momentum=0.9),
  ),
}


# Their slots do not start at zero, or are those of something inside.
STARTED = {
  'adagrad': lambda: optax.adagrad(0.1, initial_accumulator_value=0.3),
  'rprop': lambda: optax.rprop(0.2),
  'rmsprop': lambda: optax.rmsprop(0.1, initial_scale=0.7),
  'schedule_free': lambda: optax.contrib.schedule_free_sgd(0.1),
  'multi_steps': lambda: optax.MultiSteps(
    optax.adam(0.1), 2
  ).gradient_transformation(),
  'powered': lambda: powerprop.powerprop(optax.adagrad(0.1), 2.0),
}


def cases(table):
  """Its rows (transformation, inner, …), the many marked as slow."""
  return [
    row
    if row[1] == 'adam' or row[1:] == ('masked_chain', 'multi_steps')
    else pytest.param(*row, marks=pytest.mark.slow)
    for row in table
  ]
