"""Compositions of the library with Optax, as lines of code.

A composition is kept as code so that a failing one can be read and pasted. TX
stands for what is inside: 'optax.chain(optax.clip(0.5), TX)'.
"""

import ast
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.train.scale import fusing

PATHS = ('m/w', 'm/b', 'n/w')
WEIGHTS = ('m/w', 'n/w')

# A layer with a single weight, and a convolution.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
  'mlp': {'m/w': (3, 4), 'm/b': (4,), 'n/w': (4, 2)},
  'tiny': {'m/w': (1, 2), 'm/b': (2,), 'n/w': (1, 1)},
  'conv': {'m/w': (2, 2, 2, 3), 'm/b': (3,), 'n/w': (3, 2)},
}
DTYPES: dict[str, dict[str, Any]] = {
  'float32': dict.fromkeys(PATHS, jnp.float32),
  'bfloat16': dict.fromkeys(PATHS, jnp.bfloat16),
  'float16': dict.fromkeys(PATHS, jnp.float16),
  'mixed': {'m/w': jnp.bfloat16, 'm/b': jnp.float32, 'n/w': jnp.float32},
}


@dataclasses.dataclass(frozen=True)
class Composition:
  """A transformation, and how it is trained.

  Attributes:
    inner: the optimiser.
    inside: what is around it, from the inside out, where parameters are θ.
    alpha: the power; None is without powerprop.
    form: of powerprop.
    between: what is around powerprop, within the method.
    method: a method of the library; None is dense.
    outside: what is around all.
    shapes: of the parameters, a name in SHAPES.
    dtypes: likewise in DTYPES.
    num_zeros: how many entries of each weight start at zero, at most.
    steps: number of updates.
    jit: whether the step is compiled; its state is then donated.
    quiet: whether gradients are zero where connections are rewired.
    bad: (step, value, where): a gradient that is not finite, at a weight that
      is 'trained' or 'hidden'.
    value: whether update is given the loss.
    twice: whether sparsify writes the update down twice.
    wide: whether gradients are float32 whatever the parameters are.
  """

  inner: str = 'optax.sgd(0.1)'
  inside: tuple[str, ...] = ()
  alpha: str | None = None
  form: str = 'recommended'
  between: tuple[str, ...] = ()
  method: str | None = None
  outside: tuple[str, ...] = ()
  shapes: str = 'mlp'
  dtypes: str = 'float32'
  num_zeros: int = 0
  steps: int = 5
  jit: bool = True
  quiet: bool = False
  bad: tuple[int, str, str] | None = None
  value: bool = False
  twice: bool = False
  wide: bool = False

  def __repr__(self) -> str:
    given = (
      f'{field.name}={getattr(self, field.name)!r}'
      for field in dataclasses.fields(self)
      if getattr(self, field.name) != field.default
    )
    return f'Composition({", ".join(given)})'

  @property
  def code(self) -> str:
    """The transformation as one line."""
    tx = _wrap(self.inner, self.inside)
    if self.alpha is not None:
      form = '' if self.form == 'recommended' else f', form={self.form!r}'
      tx = f'pp.powerprop({tx}, {self.alpha}{form})'
    tx = _wrap(tx, self.between)
    method = self.method or 'TX'
    if self.twice and self.method:
      method = f'fusing.fused({method})'
    return _wrap(tx, (method, *self.outside))

  def build(self, **names: Any) -> Any:
    return _evaluate(self.code, **names)

  def build_inner(self) -> Any:
    """What the method is given."""
    inner = dataclasses.replace(self, method=None, outside=())
    return _evaluate(inner.code)

  def without_library(self) -> 'Composition':
    """What Optax alone makes of it."""
    optax_only = lambda links: tuple(s for s in links if 'pp.' not in s)
    return dataclasses.replace(
      self,
      inside=optax_only(self.inside),
      alpha=None,
      between=optax_only(self.between),
      method=None,
      outside=optax_only(self.outside),
    )

  @property
  def name(self) -> str | None:
    """Of the method."""
    return None if self.method is None else _call(self.method)[0]

  @property
  def selected(self) -> tuple[str, ...]:
    """The leaves that the method masks."""
    return WEIGHTS if self.option('select') is None else ('m/w',)

  @property
  def sparsity(self) -> Any:
    assert self.method is not None
    arguments = _call(self.method)[1]
    return arguments[0] if arguments else None

  def option(self, name: str, default: Any = None) -> Any:
    """A keyword argument of the method."""
    return (
      None if self.method is None else _call(self.method)[2].get(name, default)
    )

  @property
  def distribution(self) -> Any:
    named = self.option('distribution')
    return None if named is None else _evaluate(named)

  @property
  def alphas(self) -> dict[str, float]:
    """The powers by leaf."""
    alpha = 1.0 if self.alpha is None else _evaluate(self.alpha)
    by_leaf = {
      path: float(_leaf(alpha, path) if isinstance(alpha, dict) else alpha)
      for path in WEIGHTS
    }
    return {'m/b': 1.0, **by_leaf}

  @property
  def is_powered(self) -> bool:
    """Whether α is not certainly 1, as sparsify counts."""
    if self.alpha is None:
      return False
    powers = jax.tree.leaves(_evaluate(self.alpha))
    return any(not isinstance(a, float) or a != 1 for a in powers)

  @property
  def regrow(self) -> str:
    """How new connections start."""
    if self.name in ('gradual_pruning', 'one_shot_pruning'):
      return 'zero'
    if self.name == 'top_kast':
      return 'keep'
    unsaid = 'keep' if self.is_powered else 'zero'
    return self.option('regrow') or unsaid

  @property
  def replaces_step(self) -> bool:
    return self.option('replaces_step', self.name == 'rigl')

  def is_due(self, step: int | None) -> bool:
    """Whether the update of that number rewires."""
    if self.method is None or self.name == 'static':
      return False
    assert step is not None
    if self.name == 'one_shot_pruning':
      return step == self.option('step')
    period = self.option('period', 1)
    if self.name == 'top_kast':
      return step % period == 0
    if self.name == 'gradual_pruning':
      since = step - self.option('start')
      whole = self.option('stop') - self.option('start')
      return (0 < since < whole and since % period == 0) or since == whole
    return step % period == 0 and period <= step < self.option('stop')

  def theta(self) -> dict[str, dict[str, jax.Array]]:
    """Weights of an even spread, with the zeros asked for."""
    rng = np.random.default_rng(0)
    leaves = {}
    for path, shape in SHAPES[self.shapes].items():
      size = rng.uniform(0.2, 1.5, shape)
      leaf = size * rng.choice([-1, 1], shape)
      if path in WEIGHTS:
        num_zeros = min(self.num_zeros, leaf.size - 1)
        leaf.flat[rng.permutation(leaf.size)[:num_zeros]] = 0
      leaves[path] = jnp.asarray(leaf, DTYPES[self.dtypes][path])
    return as_tree(leaves)


def as_tree(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """{'m/w': x, ...} as parameters."""
  return {
    'm': {'w': leaves['m/w'], 'b': leaves['m/b']},
    'n': {'w': leaves['n/w']},
  }


def as_leaves(tree: Any) -> dict[str, Any]:
  """Parameters as {'m/w': x, ...}."""
  return {path: _leaf(tree, path) for path in PATHS}


def _leaf(tree: Any, path: str) -> Any:
  module, name = path.split('/')
  return tree[module][name]


def _wrap(tx: str, templates: tuple[str, ...]) -> str:
  for template in templates:
    tx = template.replace('TX', tx)
  return tx


def _evaluate(code: str, **names: Any) -> Any:
  known = {'fusing': fusing, 'jnp': jnp, 'optax': optax, 'pp': pp}
  return eval(code, known | names)


def _call(code: str) -> tuple[str, list[Any], dict[str, Any]]:
  """Name, arguments but the first, and keyword arguments of a method."""
  call = ast.parse(code, mode='eval').body
  assert isinstance(call, ast.Call)
  assert isinstance(call.func, ast.Attribute)

  def read(node: ast.expr) -> Any:
    try:
      return ast.literal_eval(node)
    except ValueError:
      return ast.unparse(node)

  return (
    call.func.attr,
    [read(argument) for argument in call.args[1:]],
    {str(k.arg): read(k.value) for k in call.keywords},
  )
