"""Compositions of the library with Optax: refused by us, or right.

`pytest tests/optim/compositions_test.py -m slow --compositions 2000` draws
others, as many each time, and prints how to draw the same again. A failure is
cut down to few parts and ends with a line for `composition_checks`.
"""

import functools
import random
import warnings

import composition_checks
import composition_draws
import hypothesis
import pytest

# Several seeds draw more variety than one.
_PARTS = [('check', seed, 55) for seed in range(4)] + [('check_batch', 0, 10)]


@pytest.mark.parametrize(('check', 'seed', 'number'), _PARTS)
@pytest.mark.slow
def test_compositions_are_refused_or_right(check, seed, number, request):
  total = request.config.getoption('--compositions')
  if total is not None:
    number = number * total // 220
    base = request.config.getoption('--hypothesis-seed')
    base = random.getrandbits(32) if base is None else int(base)
    print(f'--compositions={total} --hypothesis-seed={base} draws these again')
    seed += base
  # Some are drawn more than once.
  run_check = functools.cache(getattr(composition_checks, check))

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=number,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(composition_draws.compositions())
  def draw(composition):
    with warnings.catch_warnings():
      # Of weights that start at zero, and of layers that stand still.
      warnings.simplefilter('ignore', UserWarning)
      hypothesis.event(run_check(composition))

  draw()
