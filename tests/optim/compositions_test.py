"""Compositions of the library with Optax: refused by us, or right.

`pytest tests/optim/compositions_test.py -m slow --compositions 2000` draws
others, as many each time, and prints how to draw the same again. A failure is
cut down to few parts and ends with a line for `composition_checks`.
"""

import functools
import random
import warnings

import composition_checks
import compositions
import hypothesis
import pytest


# Several seeds draw more variety than one.
@pytest.mark.parametrize('seed', range(4))
@pytest.mark.slow
def test_compositions_are_refused_or_right(seed, request):
  number = 55
  total = request.config.getoption('--compositions')
  if total is not None:
    number = total // 4
    base = request.config.getoption('--hypothesis-seed')
    base = random.getrandbits(32) if base is None else int(base)
    print(f'--compositions={total} --hypothesis-seed={base} draws these again')
    seed += base
  # Some are drawn more than once.
  run_check = functools.cache(composition_checks.check)

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=number,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
  )
  @hypothesis.given(compositions.COMPOSITIONS)
  def draw(composition):
    with warnings.catch_warnings():
      # Of weights that start at zero, and of layers that stand still.
      warnings.simplefilter('ignore', UserWarning)
      hypothesis.event(run_check(composition))

  draw()
