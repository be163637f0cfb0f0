"""What makes XLA compile a training step into fewer passes over the weights.

A step of plain SGD is memory traffic: with powerprop, φ, θ and the slots are
read and written once each, if the loops that write them are one. On a CPU XLA
makes one loop of several only with a flag, and only of loops that do not use
each other's results. So a program that opts in

    set_cpu_flags(os.environ, static_alpha=True)   before JAX sees a device
    tx = fused(tx)                                 an update written twice
    advance = make_advance(net, tx)                θ carried beside φ

has the new φ come from one copy of the update, and slots and θ from others.
Numbers, and states, are those of the plain step. Right for optimisers that are
a few operations a weight, as SGD; others would be computed twice, as would
everything where the flag is not set.

Measured on LeNet-300-100, batch 60, SGD, α = 2, as ratios of the dense step
(docs/results/benchmarks.md): 1.22 plain, 1.13 with θ carried, 1.11 with the
flag, 1.02 with the update written twice as well.
"""

from collections.abc import MutableMapping
import dataclasses
import os
from typing import Any

import haiku as hk
import jax
import jaxlib
import optax

from powerprop_jax.core.trees import OptState, Params, Updates
from powerprop_jax.optim import sparsify, topology, views
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.step import TrainState

# Wide vectors halve the cost of roots and powers on processors that have them.
_WIDE_VECTORS = {'--xla_cpu_prefer_vector_width': '512'}

# Loops with several outputs. Where α is an array, and the loop holds a general
# power, they were slower than two passes.
_FUSION = 'xla_cpu_use_multi_output_fusion=true'
_SEVERAL_OUTPUTS = {'--xla_backend_extra_options': _FUSION}

# XLA aborts on flags it does not know, so only versions that were tried get
# them.
_TRIED = ((0, 10), (0, 11))


def set_cpu_flags(
  environment: MutableMapping[str, str], *, static_alpha: bool
) -> None:
  """Adds what is useful to XLA_FLAGS, where the user has not set it.

  XLA reads its flags once, when JAX first touches a device: a program calls
  this before anything else, usually with os.environ, and says whether it trains
  with an α that is a Python number. Other devices do not mind.

  Example:
    >>> environment = {'XLA_FLAGS': '--xla_cpu_prefer_vector_width=256'}
    >>> set_cpu_flags(environment, static_alpha=True)
    >>> environment['XLA_FLAGS'].count('vector_width')
    1
  """
  version = tuple(int(part) for part in jaxlib.__version__.split('.')[:2])
  if not _TRIED[0] <= version < _TRIED[1]:
    return
  flags = environment.get('XLA_FLAGS', '')
  wanted = _WIDE_VECTORS | (_SEVERAL_OUTPUTS if static_alpha else {})
  for name, value in wanted.items():
    if name not in flags:
      flags = f'{flags} {name}={value}'
  environment['XLA_FLAGS'] = flags.strip()


def fuses_loops() -> bool:
  """Whether JAX runs on a CPU, with the flag for loops of several outputs.

  The question makes JAX choose its devices.
  """
  is_set = _FUSION in os.environ.get('XLA_FLAGS', '')
  return is_set and jax.default_backend() == 'cpu'


def fused(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """The same transformation, with its update written down twice.

  The step on φ comes from one copy and the new state from the other, so that
  no loop needs what another writes. What sparsify returns rewires once, and
  writes what is inside it twice; so this goes right around sparsify, and
  anything else around this.

  Example:
    >>> phi = {'w': jnp.ones(2)}
    >>> tx = fused(optax.sgd(0.1, momentum=0.9))
    >>> tx.update(phi, tx.init(phi), phi)[0]['w']
    Array([-0.1, -0.1], dtype=float32)
  """
  parts = sparsify.parts(tx)
  if parts is not None:
    sparse = _Sparse(parts.inner, parts.topology, parts.regrow, parts.key)
    return sparse.transformation()
  twice = _Twice(optax.with_extra_args_support(tx))
  return optax.GradientTransformationExtraArgs(tx.init, twice.update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Twice:
  """An update that is written twice."""

  tx: optax.GradientTransformationExtraArgs

  def update(
    self,
    updates: Updates,
    state: OptState,
    params: Params = None,
    **extra_args: Any,
  ) -> tuple[Updates, OptState]:
    given = updates, state, params
    updates, _ = self.tx.update(*given, **extra_args)
    # Without the barrier the two would be found equal and become one again.
    given = jax.lax.optimization_barrier(given)
    return updates, self.tx.update(*given, **extra_args)[1]


class _Sparse(sparsify.Parts):
  """sparsify, with what is inside it written twice."""

  def propose(
    self,
    grads: Updates,
    net: sparsify.Network,
    *given: Any,
    **extra_args: Any,
  ) -> tuple[Updates, OptState]:
    updates, _ = super().propose(grads, net, *given, **extra_args)
    grads, net = jax.lax.optimization_barrier((grads, net))
    return updates, super().propose(grads, net, *given, **extra_args)[1]


def _once(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """What was given to fused, where it writes all of it twice; or tx itself."""
  twice = getattr(tx.update, '__self__', None)
  return twice.tx if isinstance(twice, _Twice) else tx


def make_advance(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  **options: Any,
) -> step_lib.Advance:
  """step.make_advance with θ carried beside φ, where α is a Python number.

  θ is then computed where φ changes, in the same loop if tx is fused. Where α
  is an array the step computes θ and the slope together instead, which share
  their one power; and sparsify carries no θ, which would mostly be a copy of φ.
  The transformation is fused or not, the options are those of step.make_step.
  """
  once = _once(tx)
  step = step_lib.make_step(net, once, **options)

  def step_with_theta(
    carry: tuple[TrainState, hk.Params], images: jax.Array, labels: jax.Array
  ) -> tuple[tuple[TrainState, hk.Params], step_lib.Metrics]:
    state, theta = carry
    grads, net_state, metrics = step.gradient(state, images, labels, theta)
    after = copy = step.update(state, grads, net_state)
    if once is not tx:
      grads, state = jax.lax.optimization_barrier((grads, state))
      copy = step.update(state, grads, net_state)
    return (after, copy.theta), metrics

  def advance(
    state: TrainState, arrays: Arrays, indices: jax.Array
  ) -> tuple[TrainState, step_lib.Metrics]:
    is_sparse = topology.find_sparse_state(state.opt_state) is not None
    if is_sparse or not views.is_alpha_static(state.opt_state):
      return step_lib.repeated(step)(state, arrays, indices)
    carry = state, state.theta
    (state, _), metrics = step_lib.repeated(step_with_theta)(
      carry, arrays, indices
    )
    return state, metrics

  return advance
