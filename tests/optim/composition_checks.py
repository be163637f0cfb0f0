"""What every composition promises: it is refused by us, or right."""

import dataclasses
import math
import pathlib
import traceback
from typing import Any

import chex
from composition_draws import ADAPTIVE, CLEAR, SGD, SKIPPING
from composition_replays import (
  Reference,
  Replay,
  has_reference,
  has_survivors,
  is_replayed,
)
from composition_runs import Look, Move, is_by_weight, train
from compositions import PATHS, WEIGHTS, Composition
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.optim.topologies.counts import Budget

_PACKAGE = pathlib.Path(pp.__file__).parent


def check(composition: Composition) -> str:
  """'right', 'refused' by us, or 'not Optax' if that has no such composition.

  It is trained. If it is neither, an AssertionError ends with its code.
  """
  c = composition
  try:
    return _check(c)
  except Exception as error:
    raise AssertionError(
      f'{type(error).__name__}: {error}{_label(c)}'
    ) from error


def _check(c: Composition) -> str:
  moves = train(c)
  checks = Checks(c)
  try:
    start = next(moves)
    first = next(moves)
  except Exception as error:
    if is_ours(error):
      assert not must_work(c), f'refused: {error}'
      return 'refused'
    if _plain(c) is None:
      return 'not Optax'
    raise
  checks.start(start.after)
  checks.move(first)
  for move in moves:
    checks.move(move)
  return 'right'


def check_batch(composition: Composition) -> str:
  """The same of two powers or keys that are trained together and one alone."""
  c = composition
  by_key = c.alpha is None or 'jnp.float32(' not in c.alpha or '{' in c.alpha
  if by_key:
    if c.name not in ('static', 'sparse_evolution', 'rigl', 'snfs', 'dsr'):
      return 'no lanes'
    method = c.method[:-1] + ', key=lane)'
    batch, lanes = dataclasses.replace(c, method=method), jnp.array([3, 7])
  else:
    batch = dataclasses.replace(c, alpha='lane')
    lanes = jnp.array([1.5, 2.0], jnp.float32)
  rng = np.random.default_rng(1)
  targets = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=(c.steps, *x.shape)), x.dtype),
    c.theta(),
  )

  def train(lane: jax.Array) -> Any:
    tx = optax.with_extra_args_support(batch.build(lane=lane))

    def step(carry: Any, target: Any) -> Any:
      phi, state = carry
      seen = pp.effective_params(phi, state)
      grads = jax.tree.map(lambda a, b: a - b, seen, target)
      extra_args = {'value': jnp.float32(1)} if c.value else {}
      updates, state = tx.update(grads, state, phi, **extra_args)
      phi = optax.apply_updates(phi, updates)
      return (phi, state), pp.current_masks(phi, state)

    (phi, state), masks = jax.lax.scan(step, pp.init(tx, c.theta()), targets)
    return pp.effective_params(phi, state), masks

  try:
    alone = jax.jit(train)(lanes[1])
    together = jax.jit(jax.vmap(train))(lanes)
  except Exception as error:
    if is_ours(error):
      return 'refused'
    if _plain(dataclasses.replace(c, jit=True)) is None:
      return 'not Optax'
    raise AssertionError(f'{type(error).__name__}: {_label(c)}') from error
  for kind, one, two in zip(('θ', 'masks'), alone, together, strict=True):
    chex.assert_trees_all_close(
      *(
        jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
        for tree in (one, jax.tree.map(lambda x: x[1], two))
      ),
      rtol=2e-2 if c.dtypes != 'float32' else 2e-3,
      atol=2e-2 if c.dtypes != 'float32' else 1e-4,
      custom_message=f'{kind} in a batch: {_label(c)}',
    )
  return 'right'


def _label(c: Composition) -> str:
  return f'\n  tx = {c.code}\n  check({c!r})'


def is_ours(error: Exception) -> bool:
  """Whether it is a refusal of the library that says something."""
  last = traceback.extract_tb(error.__traceback__)[-1]
  return (
    isinstance(error, ValueError | TypeError)
    and pathlib.Path(last.filename).is_relative_to(_PACKAGE)
    and len(str(error)) > 40
  )


def must_work(c: Composition) -> bool:
  """Whether there is no reason to refuse it."""
  regrows_dead = c.option('regrow') == 'zero' and c.is_powered
  names_leaves = isinstance(c.method and c.sparsity, dict)
  return (
    not regrows_dead
    and not (names_leaves and c.option('select'))
    and not c.num_zeros
    and c.shapes != 'tiny'
    and all('chain' in link or link in CLEAR for link in c.inside)
    and set(c.outside) <= {*CLEAR, *SKIPPING}
  )


def _plain(c: Composition) -> list[Move] | None:
  """What Optax alone makes of it; None if it does not."""
  try:
    return list(train(c.without_library()))
  except Exception:
    return None


class Checks:
  """Looks at one training, update by update."""

  def __init__(self, c: Composition):
    self.c = c
    self.is_bad = False

  def start(self, look: Look) -> None:
    c = self.c
    self.first = look
    self.sizes = {path: look.phi[path].size for path in c.selected}
    self._look(look)
    self.replay = Replay(c, look) if is_replayed(c) else None
    self.reference = Reference(c, look) if has_reference(c) else None

  def move(self, move: Move) -> None:
    c, before, after = self.c, move.before, move.after
    at = f'update {move.number}: '
    if before.kinds != after.kinds:
      plain = _plain(c)
      if plain and all(m.before.kinds == m.after.kinds for m in plain):
        raise AssertionError(
          f'{at}the state changed its kind:\n'
          + '\n'.join(_differences(before.kinds, after.kinds))
        )
    is_bad = any(not np.isfinite(g).all() for g in move.grads.values())
    is_kept_out = c.bad is not None and (
      (c.bad[2] == 'hidden' and not set(c.outside) - set(CLEAR))
      or c.outside == ('optax.apply_if_finite(TX, 5)',)
    )
    # Large steps under a large power run away, whatever takes them.
    is_away = any(np.abs(phi).max() > 100 for phi in before.phi.values())
    self.is_bad |= is_away or (is_bad and not is_kept_out)
    self._look(after, at)
    if not self.is_bad:
      self._reborn(move, at)
      if self.replay is not None:
        self.replay.move(move, at)
      if self.reference is not None and not self.reference.is_over:
        self.reference.move(move, at)

  def _look(self, look: Look, at: str = 'init: ') -> None:
    c = self.c
    assert not look.faults, at + '; '.join(look.faults)
    if c.method is None:
      return
    self._promise(look, at)
    for path in PATHS:
      hidden = ~look.masks[path]
      assert not np.any(look.seen[path][hidden]), (
        f'{at}the network sees weights of {path} without a connection'
      )
      if look.pins:
        rest = look.phi[path][~look.trained[path]]
        assert not np.any(rest), f'{at}φ of {path} is not pinned: {rest}'
    if self.is_bad or not _stays_finite(c):
      return
    assert not look.has_nan, f'{at}the state holds NaN'
    for path in PATHS:
      assert np.isfinite(look.phi[path]).all(), f'{at}φ of {path} not finite'
      if c.dtypes == 'float32':
        phi, alpha = look.phi[path], c.alphas[path]
        theta = np.sign(phi) * np.abs(phi) ** alpha * look.masks[path]
        if ADAPTIVE not in c.outside:
          np.testing.assert_allclose(
            look.seen[path], theta, 2e-5, 1e-12, err_msg=f'{at}θ of {path}'
          )

  def _promise(self, look: Look, at: str) -> None:
    """The number of connections."""
    c, sizes, masks = self.c, self.sizes, look.masks
    for path in PATHS:
      assert path in sizes or look.masks[path].all(), f'{at}{path} is masked'
    counts = {path: int(look.masks[path].sum()) for path in sizes}
    if c.option('structure') is not None:
      for path in sizes:
        fan_in = look.masks[path].reshape(-1, look.masks[path].shape[-1]).sum(0)
        assert len(set(fan_in)) == 1, f'{at}fan-in of {path} is {fan_in}'
      wanted = {path: int(self.first.masks[path].sum()) for path in sizes}
    elif c.option('scope') == 'global':
      sizes = {'': sum(sizes.values())}
      counts = {'': sum(counts.values())}
      wanted = {'': pp.masks.num_kept(sizes[''], c.sparsity)}
    else:
      wanted = _kept(c, sizes)
    prunes = c.name in ('gradual_pruning', 'one_shot_pruning')
    if prunes:
      if self.is_bad or c.option('structure') is not None:
        return
      done = _progress(c, look.step)
      wanted = {
        path: size - math.floor(done * (size - wanted[path]))
        for path, size in sizes.items()
      }
    elif c.name == 'dsr' or (
      c.name == 'snfs' and c.option('redistribute', True)
    ):
      # Between layers only whole inputs move, and some may wait.
      widest = max(masks[path].shape[-1] for path in sizes)
      missing = sum(wanted.values()) - sum(counts.values())
      may_wait = c.option('structure') is not None
      assert missing == 0 or (may_wait and 0 < missing < widest), (
        f'{at}{counts} connections, promised {sum(wanted.values())}'
      )
      return
    assert counts == wanted, f'{at}{counts} connections, promised {wanted}'

  def _reborn(self, move: Move, at: str) -> None:
    """New connections start where they should."""
    c, before, after = self.c, move.before, move.after
    if c.method is None or not c.is_due(before.step):
      return
    stands = c.replaces_step or (c.quiet and is_by_weight(c))
    if not stands or set(c.outside) - {*CLEAR, *SKIPPING}:
      return
    if c.name == 'top_kast' and c.option('penalty') is None:
      return
    for path in WEIGHTS:
      reborn = after.trained[path] & ~before.trained[path]
      value = after.phi[path][reborn]
      label = f'{at}reborn φ of {path}, regrow={c.regrow!r}: {value}'
      assert np.isfinite(value).all() or not _stays_finite(c), label
      old = before.phi[path][reborn]
      is_dead = (old == 0) & (c.alphas[path] > 1)
      if c.regrow == 'zero':
        assert not np.any(value), label
      elif c.regrow == 'keep':
        assert np.array_equal(value[~is_dead], old[~is_dead]), (
          f'{label}, was {old}'
        )
        assert not c.is_powered or np.all(value[is_dead] != 0), (
          f'{label}, where ψ′ = 0'
        )
      elif has_survivors(move, path):
        assert np.all(value != 0), label


def _kept(c: Composition, sizes: dict[str, int]) -> dict[str, int]:
  """Connections of each leaf, in the end."""
  if isinstance(c.sparsity, dict):
    return {
      path: pp.masks.num_kept(sizes[path], c.sparsity[path]) for path in sizes
    }
  is_even = c.name not in ('static', 'sparse_evolution', 'rigl')
  shares = c.distribution or (pp.uniform if is_even else pp.erk)
  select = lambda module, name, value: f'{module}/{name}' in sizes
  counts = Budget(c.sparsity, shares, select).counts(c.theta())
  assert sum(counts.values()) == pp.masks.num_kept(
    sum(sizes.values()), c.sparsity
  )
  return counts


def _progress(c: Composition, step: int | None) -> float:
  """Share of the sparsity that is reached after so many updates."""
  assert step is not None
  due = [number for number in range(step) if c.is_due(number)]
  if not due:
    return 0.0
  if c.name == 'one_shot_pruning':
    return 1.0
  start, stop = c.option('start'), c.option('stop')
  power = c.option('power', 3)
  return 1 - (1 - (due[-1] - start) / (stop - start)) ** power


def _stays_finite(c: Composition) -> bool:
  """float16 holds no 1e-8, so that 0/(0 + 1e-8) is NaN in Optax as well."""
  return c.dtypes != 'float16' or c.inner in SGD


def _differences(old: Any, new: Any) -> list[str]:
  if str(old[0]) != str(new[0]):
    return [str(old[0]), str(new[0])]
  is_kind = lambda node: isinstance(node, tuple) and len(node) == 3
  leaves = lambda kinds: jax.tree_util.tree_leaves_with_path(
    kinds, is_leaf=is_kind
  )
  return [
    f'{jax.tree_util.keystr(path)}: {a} to {b}'
    for (path, a), (_, b) in zip(leaves(old[1]), leaves(new[1]), strict=True)
    if a != b
  ]
