"""What every composition promises: it is refused by us, or right."""

import dataclasses
import pathlib
import traceback
from typing import NamedTuple

import chex
import compositions as co
from compositions import flat
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.optim import topology

_PACKAGE = pathlib.Path(pp.__file__).parent


def check(c):
  """'right', 'refused' by us, or 'not Optax' if that has no such composition.

  It is trained. If it is neither, an AssertionError ends with its code.
  """
  try:
    return _check(c)
  except Exception as error:
    message = f'{type(error).__name__}: {error}{_label(c)}'
    raise AssertionError(message) from error


def _check(c):
  moves = train(c)
  try:
    start, first = next(moves), next(moves)
  except Exception as error:
    if is_ours(error):
      assert not must_work(c), f'refused: {error}'
      return 'refused'
    if _plain(c) is None:
      return 'not Optax'
    raise
  checks = Checks(c, start.after)
  for move in (first, *moves):
    checks.move(move, f'update {move.number}: ')
  return 'right'


def _label(c):
  return f'\n  tx = {c.code}\n  check({c!r})'


def is_ours(error):
  """Whether it is a refusal of the library that says something."""
  last = traceback.extract_tb(error.__traceback__)[-1]
  return (
    isinstance(error, ValueError | TypeError)
    and pathlib.Path(last.filename).is_relative_to(_PACKAGE)
    and len(str(error)) > 40
  )


def must_work(c):
  """Whether there is no reason to refuse it."""
  options, sparsity = c.options, c.options.get('sparsity')
  names_leaves = isinstance(sparsity, dict)
  return (
    not (options.get('regrow') == 'zero' and c.is_powered)
    and not (names_leaves and 'select' in options)
    and not ('scope' in options and (names_leaves or 'structure' in options))
    and not c.num_zeros
    and c.shapes != 'tiny'
    and all('chain' in link or link in co.CLEAR for link in c.inside)
    and set(c.outside) <= {*co.EXACT}
  )


def _plain(c):
  """What Optax alone makes of it; None if it does not."""
  try:
    return list(train(c.without_library()))
  except Exception:
    return None


class Look(NamedTuple):
  """Parameters and state between two updates; weights in NumPy vectors."""

  phi: np.ndarray
  seen: np.ndarray
  masks: np.ndarray
  trained: np.ndarray  # more than masks with Top-KAST
  step: int | None  # what sparsify counts
  regrow: str | None
  pins: bool
  has_nan: bool


class Move(NamedTuple):
  """An update: what it was given, and what came of it."""

  number: int
  num_traces: int
  grads: np.ndarray
  before: Look
  after: Look

  @property
  def reborn(self):
    return self.after.trained & ~self.before.trained

  @property
  def survives(self):
    return self.after.trained & self.before.trained & (self.before.seen != 0)


def train(c):
  """Yields the state after init, in a Move of number -1, and each update."""
  tx = optax.with_extra_args_support(c.build())
  phi, state = pp.init(tx, c.theta())
  num_traces = 0

  def step(grads, phi, state, loss):
    nonlocal num_traces
    num_traces += 1
    extra_args = {'value': loss} if c.value else {}
    updates, state = tx.update(grads, state, phi, **extra_args)
    return optax.apply_updates(phi, updates), state

  if c.jit:
    step = jax.jit(step, donate_argnums=(1, 2))
  look = _look(c, phi, state)
  yield Move(-1, 0, look.phi, look, look)
  for number in range(c.steps):
    grads = _gradient(c, number, look)
    phi, state = step(grads, phi, state, _loss(number))
    before, look = look, _look(c, phi, state)
    num_traces = num_traces if c.jit else 1
    yield Move(number, num_traces, flat(grads), before, look)


def _loss(number):
  return jnp.float32(1 / (1 + number))


def _gradient(c, number, look):
  """∂/∂θ of ½ ‖θ - target‖², with what is to be wrong with it."""
  rng = np.random.default_rng(number + 1)
  grads = look.seen - rng.normal(size=look.seen.shape)
  if c.bad and c.bad[0] == number:
    trained = look.trained if c.bad[2] == 'trained' else ~look.trained
    places = np.flatnonzero(c.parts(trained)['m/w'])
    c.parts(grads)['m/w'].flat[places[:1]] = float(c.bad[1])
  return c.tree(grads, 'float32' if c.wide else c.dtypes)


def _look(c, phi, state):
  sparse = topology.find_sparse_state(state)
  seen = pp.effective_params(phi, state)
  pinned = pp.effective_params(phi, state, pinned=True)
  chex.assert_trees_all_equal(seen, pinned)
  masks = trained = flat(pp.current_masks(phi, state), bool)
  if c.name == 'top_kast' and sparse is not None:
    trained = masks | flat(sparse.memory, bool)
  if sparse is not None and is_by_weight(c):
    _assert_fresh_slots(c, sparse.inner_state, c.tree(trained, bool))
  return Look(
    phi=flat(phi),
    seen=flat(seen),
    masks=masks,
    trained=trained,
    step=None if sparse is None else int(sparse.step),
    regrow=sparse and sparse.regrow.value,
    pins=sparse is not None and sparse.pins,
    has_nan=any(
      jnp.issubdtype(x.dtype, jnp.floating) and bool(jnp.isnan(x).any())
      for x in jax.tree.leaves(state)
    ),
  )


def is_by_weight(c):
  """Whether a weight without gradients stays, and its slots at zero."""
  return c.inner in co.BY_WEIGHT and not c.inside and not c.between


def _assert_fresh_slots(c, state, trained):
  """Those of weights that are not trained are zero."""

  def visit(slot, mask):
    assert not jnp.where(mask, 0, slot).any(), f'stale: {slot} at {~mask}'
    return slot

  inner = dataclasses.replace(c, method=(None, ()), outside=())
  optax.tree.map_params(inner.build(), visit, state, trained)


class Checks:
  """Looks at one training, update by update."""

  def __init__(self, c, look):
    self.c, self.first, self.is_bad = c, look, False
    self.oracle = Oracle(c, look) if has_oracle(c) else None
    self._look(look, 'init: ')

  def move(self, move, at):
    c, before, after = self.c, move.before, move.after
    if move.num_traces > 1:  # by a state that changed its kind
      plain = _plain(c)
      assert not plain or plain[-1].num_traces > 1, f'{at}traced again'
    is_hidden = c.bad and c.bad[2] == 'hidden' and set(c.outside) <= {*co.CLEAR}
    is_kept_out = is_hidden or c.outside == (co.IF_FINITE,)
    # Large steps under a large power run away, whatever takes them.
    is_away = np.abs(before.phi).max() > 100
    is_bad = not np.isfinite(move.grads).all()
    self.is_bad |= is_away or (is_bad and not is_kept_out)
    self._look(after, at)
    if 'pruning' in (c.name or ''):
      returned = after.masks & ~before.masks
      assert not returned.any(), f'{at}connections return'
    if self.oracle is not None and not self.is_bad:
      self.oracle.move(move, at)

  def _look(self, look, at):
    c = self.c
    if c.name is None:
      return
    self._promise(look, at)
    behind = look.seen[~look.masks]
    assert not behind.any(), f'{at}seen without a connection: {behind}'
    rest = look.phi[~look.trained]
    assert not (look.pins and rest.any()), f'{at}φ is not pinned: {rest}'
    if self.is_bad or not _stays_finite(c):
      return
    assert not look.has_nan, f'{at}the state holds NaN'
    assert np.isfinite(look.phi).all(), f'{at}φ is not finite'
    if c.dtypes == 'float32' and co.ADAPTIVE not in c.outside:
      theta = look.masks * _psi(look.phi, c.alphas)
      np.testing.assert_allclose(look.seen, theta, 2e-5, 1e-12, err_msg=at)

  def _promise(self, look, at):
    """The number of connections."""
    c, options, sparsity = self.c, self.c.options, self.c.options['sparsity']
    masks = c.parts(look.masks)
    for path, mask in masks.items():
      assert path in c.selected or mask.all(), f'{at}{path} is masked'
    counts, start = (
      {path: int(mask.sum()) for path, mask in c.parts(m).items()}
      for m in (look.masks, self.first.masks)
    )
    told = f'{at}{counts} connections, {start} at the start'
    total = sum(counts[path] for path in c.selected)
    if 'structure' in options:
      for path in c.selected:
        fan_in = masks[path].reshape(-1, masks[path].shape[-1]).sum(0)
        assert len({*fan_in}) == 1, f'{at}fan-in of {path} is {fan_in}'
    elif not isinstance(sparsity, dict) and not self._is_dense(look.step):
      size = sum(masks[path].size for path in c.selected)
      assert total == pp.masks.num_kept(size, sparsity), told
    if c.name == 'dsr' or (c.name == 'snfs' and 'redistribute' not in options):
      # Between layers only whole inputs move, and some may wait.
      missing = sum(start.values()) - sum(counts.values())
      widest = max(masks[path].shape[-1] for path in c.selected)
      assert 0 <= missing < (widest if 'structure' in options else 1), told
    elif 'pruning' not in c.name:
      assert counts == start, told

  def _is_dense(self, step):
    """Whether not all that is to go has gone yet."""
    options = self.c.options
    return 'pruning' in self.c.name and (
      self.is_bad or step <= options.get('stop', options.get('step'))
    )


def _stays_finite(c):
  """float16 holds no 1e-8, so that 0/(0 + 1e-8) is NaN in Optax as well."""
  return c.dtypes != 'float16' or c.inner in co.SGD


def _psi(phi, alpha):
  return np.sign(phi) * np.abs(phi) ** alpha


def has_oracle(c):
  return (
    c.dtypes == 'float32'
    and not c.between
    and set(c.outside) <= {*co.EXACT}
    and not any('pp.' in link for link in c.inside)
    and (c.name is not None or not c.outside)
    and not (c.name and c.topology.penalise)
  )


class Oracle:
  """The definition in NumPy, in float64, with Optax for the step on θ.

      Δφ = B ⊙ ψ′(φ) ⊙ step(g ⊙ B, θ ⊙ B)

  It takes the masks as they are. It ends where a drawn value and a step come
  together, and at the first rewiring where slots are more than one for each
  weight.
  """

  def __init__(self, c, look):
    self.c, self.phi, self.is_over, self.grads = c, look.phi, False, []
    plain = dataclasses.replace(c.without_library(), outside=())
    self.tx = optax.with_extra_args_support(plain.build())
    self.state = self.tx.init(self._shown(self.phi, look.trained))

  def _shown(self, phi, trained):
    """What the optimiser sees of the parameters."""
    seen = phi if self.c.form == 'naive' else _psi(phi, self.c.alphas)
    return self.c.tree(seen * trained)

  def move(self, move, at):
    c = self.c
    self.grads.append(move.grads)
    is_step = c.name is None or move.after.step != move.before.step
    if is_step and not self.is_over:
      self._step(move, np.mean(self.grads, axis=0))
    if is_step or 'MultiSteps' not in str(c.outside):
      self.grads = []
    if not self.is_over:
      atol = 1e-5 if c.inner in co.SGD and not c.inside else 1e-4
      told = f'{at}φ is not that of the definition'
      np.testing.assert_allclose(
        move.after.phi, self.phi, 1e-3, atol, err_msg=told
      )

  def _step(self, move, grads):
    c, after = self.c, move.after
    phi, step = self.phi, 0
    is_due = c.rewires_at(move.before.step)
    if is_due:
      phi = self._started(move, grads)
      self.is_over |= phi is None or not is_by_weight(c)
    if self.is_over:
      return
    if is_due:
      changed = c.tree(after.trained ^ move.before.trained, bool)
      clear = lambda slot, where: jnp.where(where, 0, slot)
      self.state = optax.tree.map_params(self.tx, clear, self.state, changed)
    if not (is_due and c.topology.replaces_step):
      grads = np.where(after.trained, grads, 0)
      slope = c.alphas * np.abs(phi) ** (c.alphas - 1)
      is_naive = c.form == 'naive'
      extra_args = {'value': _loss(move.number)} if c.value else {}
      steps, self.state = self.tx.update(
        c.tree(grads * slope if is_naive else grads),
        self.state,
        self._shown(phi, after.trained),
        **extra_args,
      )
      step = flat(steps) * (1 if is_naive else slope)
    rest = 0 if after.pins else self.phi
    self.phi = np.where(after.trained, phi + step, rest)

  def _started(self, move, grads):
    """φ with the first values of new connections; None if nobody can tell."""
    c, phi, regrow = self.c, self.phi.copy(), move.after.regrow
    told = move.reborn
    if regrow in ('zero', 'keep'):
      # Where ψ′ = 0 a rewiring gives trained weights another value.
      told = move.after.trained & (phi == 0) & (c.alphas > 1)
    elif regrow == 'smallest':
      leaves = [c.parts(x) for x in (phi, grads, told, move.survives)]
      for path in c.selected:
        p, g, new, survives = (leaf[path] for leaf in leaves)
        if survives.any():
          least = np.abs(p[survives]).min()
          p[new] = np.where(g > 0, -least, least)[new]
          new[...] = False
    if not told.any():
      return phi
    # Taken as they are, unless a step was added to them.
    is_told = c.topology.replaces_step
    return np.where(told, move.after.phi, phi) if is_told else None
