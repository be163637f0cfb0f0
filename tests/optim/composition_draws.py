"""Draws of compositions, and what is known about their parts."""

from typing import Any, get_args

from compositions import DTYPES, Composition
from hypothesis import strategies as st

from powerprop_jax.optim import topology

_ONLY_WEIGHTS = "{'m': {'w': True, 'b': False}, 'n': {'w': True}}"
_LABELS = "{'m': {'w': 'x', 'b': 'y'}, 'n': {'w': 'y'}}"

# Learning rate, momentum, and whether that is Nesterov's.
SGD = {
  'optax.sgd(0.1)': (0.1, 0.0, False),
  'optax.sgd(0.1, momentum=0.9)': (0.1, 0.9, False),
  'optax.sgd(0.1, momentum=0.9, nesterov=True)': (0.1, 0.9, True),
  'optax.sgd(optax.constant_schedule(0.1), momentum=0.5)': (0.1, 0.5, False),
  'optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)': (0.1, 0.0, False),
}
# Their slots start with zeros, one for each weight, and stay so where there was
# never a gradient; nor does such a weight move.
BY_WEIGHT = (
  *SGD,
  'optax.sgd(optax.cosine_decay_schedule(0.1, 20), momentum=0.9)',
  'optax.adam(0.01)',
  'optax.amsgrad(0.01)',
  'optax.lion(0.01)',
  'optax.rmsprop(0.01, momentum=0.9)',
  'optax.chain(optax.trace(0.9), optax.scale(-0.1))',
  'optax.chain(optax.ema(0.9), optax.scale_by_learning_rate(0.1))',
)
OTHER_INNERS = (
  'optax.adabelief(0.01)',
  'optax.adamw(0.01, weight_decay=0.1)',
  'optax.adagrad(0.05)',
  'optax.adadelta(0.1)',
  'optax.adafactor(0.01, min_dim_size_to_factor=2)',
  'optax.adafactor(0.01, min_dim_size_to_factor=2, momentum=0.9)',
  'optax.lamb(0.01, weight_decay=0.01)',
  'optax.lars(0.1)',
  'optax.nadamw(0.01)',
  'optax.noisy_sgd(0.1, key=0)',
  'optax.novograd(0.01)',
  'optax.radam(0.01)',
  'optax.rprop(0.01)',
  'optax.sm3(0.1)',
  'optax.yogi(0.01)',
  'optax.contrib.muon(0.01)',
  'optax.contrib.ademamix(0.01)',
  'optax.contrib.adopt(0.01)',
  'optax.contrib.dowg()',
  'optax.contrib.prodigy()',
  f"optax.multi_transform({{'x': optax.adam(0.01), 'y': optax.sgd(0.1)}}, "
  f'{_LABELS})',
)

# Around the optimiser, where parameters are θ and gradients ∂L/∂θ.
LINKS = (
  'optax.chain(optax.clip(0.5), TX)',
  'optax.chain(optax.clip_by_global_norm(1.0), TX)',
  'optax.chain(optax.adaptive_grad_clip(0.1), TX)',
  'optax.chain(optax.add_decayed_weights(0.01), TX)',
  f'optax.chain(optax.masked(optax.add_decayed_weights(0.01), {_ONLY_WEIGHTS}'
  '), TX)',
  'optax.chain(pp.decay_theta(0.01), TX)',
  'optax.chain(optax.ema(0.9), TX)',
  'optax.chain(optax.trace(0.9), TX)',
  'optax.chain(optax.centralize(), TX)',
  'optax.chain(optax.zero_nans(), TX)',
  'optax.chain(optax.add_noise(0.01, 0.55, key=0), TX)',
  'optax.chain(TX, optax.scale(0.5))',
  'optax.chain(TX, optax.scale_by_schedule(optax.linear_schedule(1, 0.5, 5)))',
  'optax.chain(TX, optax.add_decayed_weights(-0.01))',
  'optax.chain(TX, optax.clip(0.05))',
  'optax.chain(TX, optax.apply_every(2))',
  'optax.chain(TX, optax.scale_by_trust_ratio(0.0, 0.01))',
)
INSIDE = (
  *LINKS,
  'optax.MultiSteps(TX, 2).gradient_transformation()',
  'optax.apply_if_finite(TX, 5)',
  'optax.conditionally_mask(TX, lambda step: step % 3 != 1)',
  'optax.conditionally_transform(TX, lambda step: step % 3 != 1)',
  f'optax.masked(TX, {_ONLY_WEIGHTS})',
  f"optax.multi_transform({{'x': TX, 'y': optax.sgd(0.1)}}, {_LABELS})",
  'optax.flatten(TX)',
  'optax.contrib.sam(TX, optax.sgd(0.05), sync_period=2)',
  'optax.contrib.schedule_free(TX, learning_rate=0.1)',
  'optax.chain(TX, optax.contrib.reduce_on_plateau())',
  "optax.named_chain(('one', optax.clip(0.5)), ('two', TX))",
)
# Between powerprop and sparsify: gradients ∂L/∂θ, parameters and steps φ.
BETWEEN = (
  'optax.chain(optax.clip(0.5), TX)',
  'optax.chain(optax.clip_by_global_norm(1.0), TX)',
  'optax.chain(TX, pp.decay_phi(0.01, 0.1))',
  'optax.chain(TX, optax.scale(0.5))',
  'optax.apply_if_finite(TX, 5)',
  'optax.MultiSteps(TX, 2).gradient_transformation()',
)
# Around all, changing nothing of what is right.
CLEAR = (
  'optax.chain(TX)',
  'optax.apply_if_finite(TX, 5)',
  'optax.inject_hyperparams(lambda unused: TX)(unused=0.1)',
)
# Around all, what skips or gathers steps.
SKIPPING = (
  'optax.MultiSteps(TX, 2).gradient_transformation()',
  'optax.conditionally_mask(TX, lambda step: step % 3 != 1)',
  'optax.MultiSteps(TX, lambda step: 1 + step % 2).gradient_transformation()',
)
# Around all, what works on dense gradients before.
BEFORE = (
  'optax.chain(optax.identity(), TX)',
  'optax.chain(optax.clip(0.5), TX)',
  'optax.chain(optax.clip_by_global_norm(1.0), TX)',
  'optax.chain(optax.scale(0.5), TX)',
  'optax.chain(optax.trace(0.9), TX)',
  'optax.chain(optax.zero_nans(), TX)',
  'optax.chain(optax.add_noise(0.01, 0.55, key=0), TX)',
  "optax.named_chain(('one', optax.clip(0.5)), ('two', TX))",
)
# Around all, what works on the step on φ, or is to sparsify what it is not.
AFTER = (
  'optax.chain(TX, optax.identity())',
  'optax.chain(TX, optax.scale(0.5))',
  'optax.chain(TX, optax.scale_by_learning_rate(0.5, flip_sign=False))',
  'optax.chain(TX, optax.scale_by_schedule(optax.linear_schedule(1, 0.5, 5)))',
  'optax.chain(TX, optax.clip(0.05))',
  'optax.chain(TX, optax.add_noise(0.01, 0.55, key=0))',
  'optax.chain(TX, optax.add_decayed_weights(-0.01))',
  'optax.chain(TX, optax.apply_every(2))',
  'optax.chain(TX, optax.trace(0.5))',
  'optax.chain(TX, pp.decay_phi(0.1, 0.1))',
  "optax.named_chain(('two', TX), ('one', optax.scale(0.5)))",
  f'optax.chain(TX, optax.masked(optax.scale(0.5), {_ONLY_WEIGHTS}))',
  'optax.conditionally_transform(TX, lambda step: step % 3 != 1)',
  f'optax.masked(TX, {_ONLY_WEIGHTS})',
  f"optax.multi_transform({{'x': TX, 'y': optax.sgd(0.1)}}, {_LABELS})",
  'optax.flatten(TX)',
  'optax.contrib.sam(TX, optax.sgd(0.05), sync_period=2)',
  'optax.contrib.schedule_free(TX, learning_rate=0.1)',
  'pp.powerprop(TX, 2.0)',
  'pp.static(TX, 0.5)',
)
ADAPTIVE = 'pp.adaptive_alpha(TX, pp.near_zero_controller(0.3), period=2)'

ALPHAS = (
  '1.0',
  '1.25',
  '1.5',
  '1.7',
  '2.0',
  '3.0',
  'jnp.float32(1.0)',
  'jnp.float32(1.5)',
  'jnp.float32(1.7)',
  'jnp.float32(2.0)',
  'jnp.float32(3.0)',
  "{'m': {'w': jnp.float32(2.0)}, 'n': {'w': 1.5}}",
  "{'m': {'w': 1.0}, 'n': {'w': jnp.float32(1.25)}}",
  "{'m': {'w': 1.0}, 'n': {'w': 1.0}}",
)


def _maybe(values: tuple[str, ...], share: int) -> st.SearchStrategy[Any]:
  """One of them in a tuple, in so many of ten draws; else an empty one."""
  some = st.sampled_from(values).map(lambda value: (value,))
  return st.integers(0, 9).flatmap(
    lambda n: some if n >= 10 - share else st.just(())
  )


@st.composite
def methods(draw: Any) -> str:
  """A method, in a few of its settings."""
  some = lambda *values: draw(st.sampled_from(values))
  name = some(
    'static',
    'gradual_pruning',
    'one_shot_pruning',
    'sparse_evolution',
    'rigl',
    'rigl',
    'snfs',
    'dsr',
    'top_kast',
  )
  sparsity = some('0.5', '0.5', '0.25', '0.75', '0.0')
  period = some(2, 2, 3, 50)
  distribution = some('', '', '', 'pp.uniform', 'pp.er', 'pp.erk')
  arguments = [f'distribution={distribution}' if distribution else '']
  if name == 'gradual_pruning':
    arguments += [f'start=0, stop=4, period={period}', some('', 'power=1')]
  elif name == 'one_shot_pruning':
    arguments += [f'step={some(0, 1, 2, 3)}']
  elif name == 'top_kast':
    backward = min(some('0.2', '0.0', sparsity), sparsity)
    arguments.insert(0, backward)
    arguments += [
      f'period={some(1, 2, 50)}',
      some('', 'penalty=0.0', 'penalty=0.1', "penalty=0.1, norm='l1'"),
    ]
  elif name != 'static':
    arguments += [
      f'stop=100, period={period}',
      some('', '', *(f'regrow={r!r}' for r in get_args(topology.Regrow))),
      some('', '', 'replaces_step=True', 'replaces_step=False'),
    ]
  if name == 'dsr':
    arguments += ['num_dropped=2, threshold=0.5']
  if name in ('sparse_evolution', 'rigl'):
    arguments += [some('', 'drop_fraction=0.6')]
  if name == 'snfs':
    arguments += [some('', 'second_moment=0.9', 'redistribute=False')]
  if name in ('gradual_pruning', 'one_shot_pruning') and not distribution:
    arguments += [some('', "scope='global'", "scope='global', normalise=True")]
  elif name not in ('dsr', 'top_kast'):
    arguments += [some(*('',) * 5, "structure='constant_fan_in'")]
  arguments += [some(*('',) * 8, "select=pp.by_regex('m/w')")]
  if name not in ('top_kast', 'dsr') and 'global' not in str(arguments):
    sparsity = some(*(sparsity,) * 5, "{'m/w': 0.5, 'n/w': 0.25}")
  return f'pp.{name}(TX, {", ".join(a for a in (sparsity, *arguments) if a)})'


@st.composite
def compositions(draw: Any) -> Composition:
  """Any of them; every other is a method around a plain optimiser."""
  is_core = draw(st.booleans())
  some = lambda *values: draw(st.sampled_from(values))
  alpha = some(None, None, None, *ALPHAS)
  inside = between = outside = ()
  inner, method = some(*BY_WEIGHT), draw(methods())
  if not is_core:
    inner = some(inner, *OTHER_INNERS)
    inside = draw(_maybe(INSIDE, 5))
    inside += draw(_maybe(LINKS, 3)) if inside else ()
    method = some(method, method, method, None)
    between = draw(_maybe(BETWEEN, 2)) if alpha and method else ()
    outside = some(
      (), (some(*CLEAR, *SKIPPING),), (some(*BEFORE),), (some(*AFTER),)
    )
    outside += draw(_maybe(CLEAR + SKIPPING + BEFORE, 3)) if outside else ()
    if alpha and 'jnp' in alpha and some(False, False, False, True):
      outside += (ADAPTIVE,)
  elif some(False, False, True):
    outside = (some(*CLEAR, *SKIPPING),)
  bad = st.tuples(
    st.integers(0, 4),
    st.sampled_from(('nan', 'inf')),
    st.sampled_from(('trained', 'hidden')),
  )
  return Composition(
    inner=inner,
    inside=inside,
    alpha=alpha,
    form=some(*('recommended',) * 4, 'naive') if alpha else 'recommended',
    between=between,
    method=method,
    outside=outside,
    shapes='mlp' if is_core else some('mlp', 'tiny', 'conv'),
    dtypes='float32' if is_core else some(*DTYPES),
    num_zeros=some(0, 0, 0, 3),
    steps=draw(st.integers(4, 8)),
    jit=some(*(True,) * 9, False),
    quiet=some(*(False,) * 5, True),
    bad=draw(bad) if some(*(False,) * 4, True) else None,
    value=draw(st.booleans()),
    twice=some(*(False,) * 9, True),
    wide=some(False, False, True),
  )
