"""Compositions of the library with Optax, as lines of code.

A composition is kept as code so that a failing one can be read and pasted. TX
stands for what is inside: 'optax.chain(optax.clip(0.5), TX)'.
"""

import dataclasses
import functools
import math
from typing import get_args

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.optim import sparsify, topology
from powerprop_jax.train.scale import fusing

# A layer with a single weight, and a convolution; leaves are in JAX's order.
SHAPES = {
  'mlp': {'m/b': (4,), 'm/w': (3, 4), 'n/w': (4, 2)},
  'tiny': {'m/b': (2,), 'm/w': (1, 2), 'n/w': (1, 1)},
  'conv': {'m/b': (3,), 'm/w': (2, 2, 2, 3), 'n/w': (3, 2)},
}
DTYPES = {
  'float32': (jnp.float32,) * 3,
  'bfloat16': (jnp.bfloat16,) * 3,
  'float16': (jnp.float16,) * 3,
  'mixed': (jnp.float32, jnp.bfloat16, jnp.float32),
}

_STRUCTURE = jax.tree.structure({'m': {'b': 0, 'w': 0}, 'n': {'w': 0}})
_ONLY_WEIGHTS = "{'m': {'w': True, 'b': False}, 'n': {'w': True}}"
_LABELS = "{'m': {'w': 'x', 'b': 'y'}, 'n': {'w': 'y'}}"

SGD = (
  'optax.sgd(0.1)',
  'optax.sgd(0.1, momentum=0.9)',
  'optax.sgd(0.1, momentum=0.9, nesterov=True)',
  'optax.sgd(optax.constant_schedule(0.1), momentum=0.5)',
  'optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)',
)
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
INNERS = (
  *BY_WEIGHT,
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

_CLIPS = (
  'optax.chain(optax.clip(0.5), TX)',
  'optax.chain(optax.clip_by_global_norm(1.0), TX)',
)
_BEFORE = (
  *_CLIPS,
  'optax.chain(optax.trace(0.9), TX)',
  'optax.chain(optax.zero_nans(), TX)',
  'optax.chain(optax.add_noise(0.01, 0.55, key=0), TX)',
)
_BEHIND = (
  'optax.chain(TX, optax.scale(0.5))',
  'optax.chain(TX, optax.scale_by_schedule(optax.linear_schedule(1, 0.5, 5)))',
  'optax.chain(TX, optax.add_decayed_weights(-0.01))',
  'optax.chain(TX, optax.clip(0.05))',
  'optax.chain(TX, optax.apply_every(2))',
)
_AROUND = (
  'optax.conditionally_transform(TX, lambda step: step % 3 != 1)',
  f'optax.masked(TX, {_ONLY_WEIGHTS})',
  f"optax.multi_transform({{'x': TX, 'y': optax.sgd(0.1)}}, {_LABELS})",
  'optax.flatten(TX)',
  'optax.contrib.sam(TX, optax.sgd(0.05), sync_period=2)',
  'optax.contrib.schedule_free(TX, learning_rate=0.1)',
)
_NAMED = "optax.named_chain(('one', optax.clip(0.5)), ('two', TX))"
IF_FINITE = 'optax.apply_if_finite(TX, 5)'
_MULTI_STEPS = 'optax.MultiSteps(TX, 2).gradient_transformation()'
_MASK_STEPS = 'optax.conditionally_mask(TX, lambda step: step % 3 != 1)'
# Around the optimiser, where parameters are θ and gradients ∂L/∂θ.
LINKS = (
  *_BEFORE,
  *_BEHIND,
  'optax.chain(optax.adaptive_grad_clip(0.1), TX)',
  'optax.chain(optax.add_decayed_weights(0.01), TX)',
  f'optax.chain(optax.masked(optax.add_decayed_weights(0.01), {_ONLY_WEIGHTS}'
  '), TX)',
  'optax.chain(pp.decay_theta(0.01), TX)',
  'optax.chain(optax.ema(0.9), TX)',
  'optax.chain(optax.centralize(), TX)',
  'optax.chain(TX, optax.scale_by_trust_ratio(0.0, 0.01))',
)
INSIDE = (
  *LINKS,
  *_AROUND,
  _NAMED,
  IF_FINITE,
  _MULTI_STEPS,
  _MASK_STEPS,
  'optax.chain(TX, optax.contrib.reduce_on_plateau())',
)
# Between powerprop and sparsify: gradients ∂L/∂θ, parameters and steps φ.
BETWEEN = (
  *_CLIPS,
  'optax.chain(TX, pp.decay_phi(0.01, 0.1))',
  'optax.chain(TX, optax.scale(0.5))',
  IF_FINITE,
  _MULTI_STEPS,
)
# Around all, changing nothing of what is right.
CLEAR = (
  'optax.chain(TX)',
  IF_FINITE,
  'optax.inject_hyperparams(lambda unused: TX)(unused=0.1)',
)
# The same, or skipping and gathering steps.
EXACT = (
  *CLEAR,
  _MULTI_STEPS,
  _MASK_STEPS,
  'optax.MultiSteps(TX, lambda step: 1 + step % 2).gradient_transformation()',
)
# Around all, what works on dense gradients before.
BEFORE = (
  *_BEFORE,
  _NAMED,
  'optax.chain(optax.identity(), TX)',
  'optax.chain(optax.scale(0.5), TX)',
)
# Around all, what works on the step on φ, or is to sparsify what it is not.
AFTER = (
  *_BEHIND,
  *_AROUND,
  'optax.chain(TX, optax.identity())',
  'optax.chain(TX, optax.scale_by_learning_rate(0.5, flip_sign=False))',
  'optax.chain(TX, optax.add_noise(0.01, 0.55, key=0))',
  'optax.chain(TX, optax.trace(0.5))',
  'optax.chain(TX, pp.decay_phi(0.1, 0.1))',
  "optax.named_chain(('two', TX), ('one', optax.scale(0.5)))",
  f'optax.chain(TX, optax.masked(optax.scale(0.5), {_ONLY_WEIGHTS}))',
  'pp.powerprop(TX, 2.0)',
  'pp.static(TX, 0.5)',
)
ADAPTIVE = 'pp.adaptive_alpha(TX, pp.near_zero_controller(0.3), period=2)'
ALPHAS = (
  *('1.0', '1.25', '1.5', '1.7', '2.0', '3.0'),
  *(f'jnp.float32({alpha})' for alpha in (1.0, 1.5, 1.7, 2.0, 3.0)),
  "{'m': {'w': jnp.float32(2.0)}, 'n': {'w': 1.5}}",
  "{'m': {'w': 1.0}, 'n': {'w': jnp.float32(1.25)}}",
  "{'m': {'w': 1.0}, 'n': {'w': 1.0}}",
)

# What each option of a method may be; '' leaves it out.
_LEAVES = {
  'sparsity': ('0.5', '0.25', '0.75', '0.0'),
  'distribution': ('', '', '', 'pp.uniform', 'pp.distributions.er', 'pp.erk'),
  'select': ('',) * 8 + ("pp.by_regex('m/w')",),
}
_PATTERNED = _LEAVES | {
  'sparsity': ('0.5', '0.5', *_LEAVES['sparsity'], "{'m/w': 0.5, 'n/w': 0.25}"),
  'structure': ('',) * 5 + ("'constant_fan_in'",),
}
_PRUNES = _PATTERNED | {
  'scope': ('', "'global'", "'global'"),
  'normalise': ('', 'True'),
}
_MOVES = {
  'stop': ('100',),
  'period': ('2', '2', '3', '50'),
  'regrow': ('', '', *map(repr, get_args(topology.Regrow))),
  'replaces_step': ('', '', 'True', 'False'),
}
_DROPS = _PATTERNED | _MOVES | {'drop_fraction': ('', '0.6')}
OPTIONS = {
  'static': _PATTERNED,
  'gradual_pruning': _PRUNES
  | {'start': ('0',), 'stop': ('4',), 'period': _MOVES['period']}
  | {'power': ('', '1')},
  'one_shot_pruning': _PRUNES | {'step': ('0', '1', '2', '3')},
  'sparse_evolution': _DROPS,
  'rigl': _DROPS,
  'snfs': _PATTERNED
  | _MOVES
  | {'second_moment': ('', '0.9'), 'redistribute': ('', '', 'False')},
  'dsr': _LEAVES | _MOVES | {'num_dropped': ('2',), 'threshold': ('0.5',)},
  'top_kast': _LEAVES
  | {
    'sparsity': ('0.25', '0.5', '0.75'),
    'backward_sparsity': ('0.0', '0.2', '0.25'),
    'period': ('1', '2', '50'),
    'penalty': ('', '0.0', '0.0'),
  },
}


@dataclasses.dataclass(frozen=True)
class Composition:
  """A transformation, and how it is trained."""

  inner: str = 'optax.sgd(0.1)'
  inside: tuple = ()  # around it, from the inside out; parameters are θ
  alpha: str | None = None  # without powerprop
  form: str = 'recommended'
  between: tuple = ()  # around powerprop, within the method
  method: tuple = (None, ())  # its name and options; dense
  outside: tuple = ()  # around all
  shapes: str = 'mlp'
  dtypes: str = 'float32'
  num_zeros: int = 0  # entries of each weight that start at zero, at most
  steps: int = 5
  jit: bool = True  # with its state donated
  bad: tuple = ()  # step, what is not finite, whether at a weight 'trained'
  value: bool = False  # update is given the loss
  twice: bool = False  # sparsify writes the update down twice
  wide: bool = False  # gradients are float32 whatever the parameters are

  @property
  def code(self):
    """The transformation as one line."""
    tx = _wrap(self.inner, self.inside)
    if self.alpha is not None:
      tx = f'pp.powerprop({tx}, {self.alpha}, form={self.form!r})'
    tx = _wrap(tx, self.between)
    if self.name is not None:
      options = ', '.join(f'{name}={code}' for name, code in self.method[1])
      tx = f'pp.{self.name}({tx}, {options})'
      tx = f'fusing.fused({tx})' if self.twice else tx
    return _wrap(tx, self.outside)

  def build(self):
    return _evaluate(self.code)

  def without_library(self):
    """What Optax alone makes of it."""
    around = {
      where: tuple(link for link in getattr(self, where) if 'pp.' not in link)
      for where in ('inside', 'between', 'outside')
    }
    return dataclasses.replace(self, alpha=None, method=(None, ()), **around)

  @property
  def name(self):
    """Of the method."""
    return self.method[0]

  @functools.cached_property
  def options(self):
    """Of the method."""
    return {name: _evaluate(code) for name, code in self.method[1]}

  @functools.cached_property
  def topology(self):
    method = dataclasses.replace(self, twice=False, outside=())
    return sparsify.parts(method.build()).topology

  def rewires_at(self, step):
    return self.name is not None and bool(self.topology.when(step))

  @property
  def selected(self):
    """The leaves that the method masks."""
    return ('m/w',) if 'select' in self.options else ('m/w', 'n/w')

  def parts(self, flat):
    """{'m/w': array, ...} of a vector of all weights."""
    shapes = SHAPES[self.shapes]
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    leaves = zip(shapes.items(), np.split(flat, ends[:-1]), strict=True)
    return {path: leaf.reshape(shape) for (path, shape), leaf in leaves}

  def tree(self, flat, dtypes='float32'):
    """Parameters of a vector of all weights."""
    dtypes = DTYPES.get(dtypes, (dtypes,) * 3)
    leaves = map(jnp.asarray, self.parts(flat).values(), dtypes)
    return jax.tree.unflatten(_STRUCTURE, leaves)

  @functools.cached_property
  def alphas(self):
    """The power of each weight."""
    alpha = _evaluate(self.alpha or '1.0')
    if not isinstance(alpha, dict):
      alpha = {'m': {'w': alpha}, 'n': {'w': alpha}}
    powers = (1.0, alpha['m']['w'], alpha['n']['w'])
    shapes = SHAPES[self.shapes].values()
    return flat(list(map(np.full, shapes, map(float, powers))))

  @property
  def is_powered(self):
    """Whether α is not certainly 1."""
    return 'jnp' in (self.alpha or '') or self.alphas.max() > 1

  def theta(self):
    """Weights of an even spread, with so many zeros."""
    rng = np.random.default_rng(0)
    size = self.alphas.size
    theta = rng.uniform(0.2, 1.5, size) * rng.choice([-1, 1], size)
    for path in ('m/w', 'n/w'):
      leaf = self.parts(theta)[path]
      num_zeros = min(self.num_zeros, leaf.size - 1)
      leaf.flat[rng.permutation(leaf.size)[:num_zeros]] = 0
    return self.tree(theta, self.dtypes)


def flat(tree, dtype=np.float64):
  """All leaves in one vector."""
  return np.concatenate(
    [np.ravel(np.asarray(x, dtype)) for x in jax.tree.leaves(tree)]
  )


def _wrap(tx, templates):
  for template in templates:
    tx = template.replace('TX', tx)
  return tx


def _evaluate(code):
  known = {'fusing': fusing, 'jnp': jnp, 'optax': optax, 'pp': pp}
  return eval(code, known)


_any_of = lambda values: st.sampled_from(values).map(lambda value: (value,))
_joined = lambda *parts: st.tuples(*parts).map(lambda drawn: sum(drawn, ()))


def _one_in(number, often, rare):
  return st.one_of(*[st.just(often)] * (number - 1), rare)


def _method(name):
  choices = {k: st.sampled_from(codes) for k, codes in OPTIONS[name].items()}
  return st.fixed_dictionaries(choices).map(
    lambda drawn: (name, tuple((k, code) for k, code in drawn.items() if code))
  )


_METHODS = st.sampled_from((*OPTIONS, 'rigl')).flatmap(_method)
_BAD = st.tuples(st.integers(0, 4), st.sampled_from(('nan', 'inf')))
_TRAINING = {
  'alpha': st.sampled_from((None, None, None, *ALPHAS)),
  'form': _one_in(5, 'recommended', st.just('naive')),
  'num_zeros': _one_in(4, 0, st.just(3)),
  'steps': st.integers(4, 8),
  'jit': _one_in(10, True, st.just(False)),
  'bad': _one_in(5, (), _joined(_BAD, _any_of(('trained', 'hidden')))),
  'value': st.booleans(),
  'twice': _one_in(10, False, st.just(True)),
  'wide': _one_in(3, False, st.just(True)),
}
COMPOSITIONS = st.one_of(
  # Methods around a plain optimiser, and all that there is.
  st.builds(
    Composition,
    inner=st.sampled_from(BY_WEIGHT),
    method=_METHODS,
    outside=_one_in(3, (), _any_of(EXACT)),
    **_TRAINING,
  ),
  st.builds(
    Composition,
    inner=st.sampled_from(INNERS),
    inside=_joined(
      _one_in(2, (), _any_of(INSIDE)), _one_in(5, (), _any_of(LINKS))
    ),
    between=_one_in(5, (), _any_of(BETWEEN)),
    method=st.one_of(st.just((None, ())), *[_METHODS] * 3),
    outside=_joined(
      st.one_of(st.just(()), *map(_any_of, (EXACT, BEFORE, AFTER))),
      _one_in(5, (), _any_of((*EXACT, *BEFORE))),
      _one_in(7, (), st.just((ADAPTIVE,))),
    ),
    shapes=st.sampled_from(tuple(SHAPES)),
    dtypes=st.sampled_from(tuple(DTYPES)),
    **_TRAINING,
  ),
)
