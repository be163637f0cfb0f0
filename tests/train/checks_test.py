"""Settings that no program can use are refused by name."""

import types

import pytest

from powerprop_jax.train.runs import checks
from powerprop_jax.train.runs.errors import UserError

SETTINGS = types.SimpleNamespace(
  keys=(0, 1),
  ones=(1, 1),
  no_keys=(),
  same=(1.0, 1.0),
  num_steps=1,
  num_test=None,
  zero=0,
)


def test_sound_ones_pass():
  checks.several(SETTINGS, 'keys')
  checks.several(SETTINGS, 'keys', 'same', differ=False)
  checks.positive(SETTINGS, 'num_steps', 'num_test', 'ones')


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda: checks.several(SETTINGS, 'keys', 'no_keys'),
     '--no-keys needs at least one value'),
    (lambda: checks.several(SETTINGS, 'no_keys', differ=False), '--no-keys'),
    (lambda: checks.several(SETTINGS, 'same'),
     r'--same must differ from each other, got \(1.0, 1.0\)'),
    (lambda: checks.positive(SETTINGS, 'num_steps', 'zero'),
     '--zero must be at least 1, got 0'),
    (lambda: checks.positive(SETTINGS, 'zero', prefix=''), '^zero must be'),
    (lambda: checks.positive(SETTINGS, 'keys'), '--keys must .*, got 0'),
  ],
)  # fmt: skip
def test_others_are_named(call, message):
  with pytest.raises(UserError, match=message):
    call()
