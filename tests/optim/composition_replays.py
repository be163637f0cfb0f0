"""Slow and obvious trainings that a composition must agree with."""

import dataclasses
from typing import Any

from composition_draws import CLEAR, SGD, SKIPPING
from composition_runs import Leaves, Look, Move, is_by_weight
from compositions import PATHS, Composition, as_leaves, as_tree
import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp


def is_replayed(c: Composition) -> bool:
  return (
    c.inner in SGD
    and not c.inside
    and not c.between
    and c.dtypes == 'float32'
    and (c.method is not None or not c.outside)
    and not set(c.outside) - {*CLEAR, *SKIPPING}
  )


class Replay:
  """SGD with masks and a power in NumPy, in float64.

      m ← μ m + g ⊙ B,    Δθ = -η m,    Δφ = Δθ ψ′(φ) ⊙ B

  It takes the masks as they are, and ends where a drawn value and a step come
  together.
  """

  def __init__(self, c: Composition, look: Look):
    self.c = c
    self.phi = {path: look.phi[path].copy() for path in PATHS}
    self.trace = {path: np.zeros_like(self.phi[path]) for path in PATHS}
    self.sum = {path: np.zeros_like(self.phi[path]) for path in PATHS}
    self.count = 0
    self.is_over = False

  def move(self, move: Move, at: str) -> None:
    if self.is_over:
      return
    c, before, after = self.c, move.before, move.after
    self.sum = {path: g + self.sum[path] for path, g in move.grads.items()}
    self.count += 1
    is_update = c.method is None or after.step != before.step
    if is_update:
      for path in PATHS:
        self._update(path, self.sum[path] / self.count, move)
    if is_update or 'MultiSteps' not in c.code:
      self.sum = {path: np.zeros_like(g) for path, g in self.sum.items()}
      self.count = 0
    for path in PATHS if not self.is_over else ():
      np.testing.assert_allclose(
        after.phi[path],
        self.phi[path],
        rtol=1e-3,
        atol=1e-5,
        err_msg=f'{at}φ of {path} is not that of a replay in NumPy',
      )

  def _update(self, path: str, g: np.ndarray, move: Move) -> None:
    c, before, after = self.c, move.before, move.after
    rate, momentum, is_nesterov = SGD[c.inner]
    alpha = c.alphas[path]
    psi = lambda x: np.sign(x) * np.abs(x) ** alpha
    slope = lambda x: alpha * np.abs(x) ** (alpha - 1)
    trained = after.trained[path]
    reborn = trained & ~before.trained[path]
    phi = _started(c, path, self.phi[path], g, move)
    if phi is None:
      self.is_over = True
      return
    trace = np.where(reborn | ~trained, 0, self.trace[path])
    if c.replaces_step and c.is_due(before.step):
      self.trace[path] = trace
    else:
      if c.name == 'top_kast' and path in c.selected:
        g = g + _penalty(c, psi(self.phi[path]), after.masks[path], trained)
      g = np.where(trained, g, 0)
      if c.form == 'naive':
        g = g * slope(phi)
      self.trace[path] = g + momentum * trace
      ahead = g + momentum * self.trace[path]
      step = -rate * (ahead if is_nesterov else self.trace[path])
      if c.form == 'recommended':
        step = step * slope(phi)
      phi = phi + np.where(trained, step, 0)
    outside = 0 if after.pins else self.phi[path]
    self.phi[path] = np.where(trained, phi, outside)


def _started(
  c: Composition, path: str, phi: Any, g: np.ndarray, move: Move
) -> Any:
  """φ with the first values of new connections; None where nobody can tell."""
  if not c.is_due(move.before.step):
    return phi
  stay = move.before.trained[path] & move.after.trained[path]
  reborn = move.after.trained[path] & ~move.before.trained[path]
  if c.regrow == 'smallest' and has_survivors(move, path):
    least = np.abs(np.where(stay & (phi != 0), phi, np.inf)).min()
    return np.where(reborn, np.where(g > 0, -least, least), phi)
  if c.regrow in ('redraw', 'smallest'):
    told = reborn
  else:
    # Where ψ′ = 0 a rewiring gives trained weights another value.
    told = (reborn | stay) & (phi == 0) & (c.alphas[path] > 1)
  if not told.any():
    return phi
  # Taken as they are, unless a step was added to them.
  return np.where(told, move.after.phi[path], phi) if c.replaces_step else None


def has_survivors(move: Move, path: str) -> bool:
  stay = move.before.trained[path] & move.after.trained[path]
  return bool(np.any(move.before.seen[path][stay]))


def _penalty(
  c: Composition, theta: np.ndarray, in_a: np.ndarray, in_b: np.ndarray
) -> np.ndarray:
  slope = np.sign(theta) if c.option('norm') == 'l1' else theta
  rest = np.where(in_b, slope * theta.size / in_a.sum(), 0)
  return float(c.option('penalty', 1e-4)) * np.where(in_a, slope, rest)


def has_reference(c: Composition) -> bool:
  return (
    c.method is not None
    and c.form == 'recommended'
    and c.dtypes == 'float32'
    and not c.between
    and not c.outside
    and c.name != 'top_kast'
    and not any('pp.' in link for link in c.inside)
  )


class Reference:
  """Optax alone, on θ and gradients that are zero where nothing is trained.

  It ends at the first rewiring where slots are more than one for each weight.
  """

  def __init__(self, c: Composition, look: Look):
    self.c = c
    plain = dataclasses.replace(c.without_library(), outside=())
    self.tx = optax.with_extra_args_support(plain.build())
    # Not pinned: what is hidden is none of Optax's business.
    self.phi = as_leaves(pp.init(c.build(), c.theta())[0])
    self.state = self.tx.init(self._theta(look.trained))
    self.is_over = False

  def _theta(self, trained: Leaves) -> Any:
    theta = {}
    for path, phi in self.phi.items():
      power = jnp.abs(phi) ** self.c.alphas[path]
      theta[path] = jnp.where(trained[path], jnp.sign(phi) * power, 0)
    return as_tree(theta)

  def move(self, move: Move, at: str) -> None:
    c, before, after = self.c, move.before, move.after
    is_due = c.is_due(before.step)
    self.is_over |= is_due and not is_by_weight(c)
    for path, g in move.grads.items():
      phi = _started(c, path, self.phi[path], g, move)
      self.is_over |= phi is None
      self.phi[path] = phi
    if self.is_over:
      return
    changed = {
      path: before.trained[path] != after.trained[path] for path in PATHS
    }
    if is_due:
      self.state = optax.tree.map_params(
        self.tx,
        lambda slot, where: jnp.where(where, 0, slot),
        self.state,
        as_tree(changed),
      )
    steps = jax.tree.map(jnp.zeros_like, as_tree(self.phi))
    if not (is_due and c.replaces_step):
      steps = self._steps(move)
    for path, step in as_leaves(steps).items():
      phi, alpha = self.phi[path], c.alphas[path]
      stepped = phi + step * alpha * jnp.abs(phi) ** (alpha - 1)
      hidden = 0 if after.pins else phi
      self.phi[path] = jnp.where(after.trained[path], stepped, hidden)
      np.testing.assert_allclose(
        after.phi[path],
        self.phi[path],
        rtol=1e-3,
        atol=1e-4,
        err_msg=f'{at}φ of {path} is not that of Optax alone',
      )

  def _steps(self, move: Move) -> Any:
    trained = move.after.trained
    grads = {
      path: jnp.asarray(np.where(trained[path], g, 0), jnp.float32)
      for path, g in move.grads.items()
    }
    value = (
      {'value': jnp.float32(1 / (1 + move.number))} if self.c.value else {}
    )
    steps, self.state = self.tx.update(
      as_tree(grads), self.state, self._theta(trained), **value
    )
    return steps
