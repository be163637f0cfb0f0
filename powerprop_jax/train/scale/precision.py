"""Mixed precision: what a network computes with, not what is stored.

φ, masks, optimiser and scores stay in float32. The layers of a network take
weights and activations rounded to bfloat16; norms compute their statistics in
float32, and so does the loss, of logits in float32. bfloat16 has the exponents
of float32, so that gradients need no scale.
"""

from collections.abc import Sequence
import contextlib
from typing import Literal, get_args

import haiku as hk
import jax
import jax.numpy as jnp
import jmp

from powerprop_jax.train.runs.errors import UserError

Half = Literal['none', 'bfloat16']

_NET = jmp.Policy(jnp.float32, jnp.bfloat16, jnp.float32)
_NORM = jmp.Policy(jnp.float32, jnp.float32, jnp.bfloat16)


def with_half(
  net: hk.TransformedWithState,
  half: Half,
  modules: Sequence[type[hk.Module]],
) -> hk.TransformedWithState:
  """A network that computes in half precision; as it is, if half is 'none'.

  The initial weights are those of the network itself, in float32; so are the
  gradients, the running statistics of norms and the logits. The modules are the
  classes of its outermost ones.

  Example:
    >>> from powerprop_jax.nets import resnet
    >>> net = hk.transform_with_state(lambda x, t: resnet.ResNet(10)(x, t))
    >>> net = with_half(net, 'bfloat16', [resnet.ResNet])
  """
  if half not in get_args(Half):
    raise UserError(
      f'half must be one of {", ".join(get_args(Half))}, got {half!r}.'
    )
  if not modules:
    raise ValueError('with_half needs the modules that compute so, got none.')
  if half == 'none':
    return net

  def apply(
    *args: object, **kwargs: object
  ) -> tuple[jax.Array, hk.MutableState]:
    with contextlib.ExitStack() as stack:
      push = hk.mixed_precision.push_policy
      for module in modules:
        stack.enter_context(push(module, _NET))
      stack.enter_context(push(hk.BatchNorm, _NORM))
      return net.apply(*args, **kwargs)

  return hk.TransformedWithState(net.init, apply)
