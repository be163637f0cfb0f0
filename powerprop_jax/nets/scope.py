"""ψ inside a Haiku function, for part of a model and plain gradient descent."""

from collections.abc import Iterator
import contextlib
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.core import reparam, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Select


@contextlib.contextmanager
def power_scope(
  alpha: float | jax.Array, select: Select = select_lib.is_weight
) -> Iterator[None]:
  """Stores selected parameters as φ and shows modules θ = ψ(φ).

  Inside the context every selected parameter that a Haiku module asks for is
  read through ψ, and initialised through ψ⁻¹, so that the network at step 0 is
  the same function for every α. The parameter tree holds φ.

  Use it where the whole training step is plain SGD and only some modules are to
  be reparameterised: ∂L/∂φ comes from the chain rule, and with SGD its step is
  that of powerprop. Do not use it with momentum, Adam or any other optimiser
  with memory: they would see ∂L/∂φ, which is not the paper's recommended step;
  nor with sparse training, since a weight at φ = 0 gets no gradient and cannot
  be told from one that is worth growing. Wrap the optimiser in powerprop then.

  Raises:
    ValueError: if alpha is known and not a finite number of at least 1, or
      if a selected parameter is seen to be initialised to zeros under α > 1,
      where it would stay for ever.

  Example:
    >>> def forward(x):
    ...   with power_scope(2.0):
    ...     return hk.Linear(1, w_init=hk.initializers.Constant(4.0))(x)
    >>> net = hk.without_apply_rng(hk.transform(forward))
    >>> x = jax.numpy.ones((1, 2))
    >>> phi = net.init(jax.random.key(0), x)
    >>> phi['linear']['w'].ravel(), net.apply(phi, x)[0]
    (Array([2., 2.], dtype=float32), Array([8.], dtype=float32))

  Source:
    Schwarz et al., Powerpropagation, 2021, section 2, the form without the
    change to the optimiser (https://arxiv.org/abs/2110.00296).
  """
  reparam.check_alpha(alpha)

  def create(next_creator: Any, *arguments: Any) -> jax.Array:
    *shape_dtype_init, context = arguments
    theta = next_creator(*shape_dtype_init)
    if not select(context.module_name, context.name, theta):
      return theta
    _check_alive(theta, alpha, context.full_name)
    return reparam.psi_inverse(theta, alpha)

  def get(next_getter: Any, value: jax.Array, context: Any) -> jax.Array:
    if select(context.module_name, context.name, value):
      value = reparam.psi(value, alpha)
    return next_getter(value)

  with hk.custom_creator(create), hk.custom_getter(get):
    yield


def _check_alive(theta: jax.Array, alpha: float | jax.Array, name: str) -> None:
  """Refuses zeros under α > 1, as far as values can be seen."""
  if trees.is_traced((theta, alpha)):
    return
  if alpha > 1 and theta.size and not jnp.any(theta):
    raise ValueError(
      f'{name} is initialised to zeros, where powerpropagation gives '
      'no gradient, so it would never move. Initialise it to other values, or '
      'leave it out with select.'
    )
