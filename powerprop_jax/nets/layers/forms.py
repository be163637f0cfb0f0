"""Whether the layers of a network have a cosine transform beside their weights.

The choice reaches layers.linear and layers.conv through a context, so that
every network is written once.
"""

from collections.abc import Iterator
import contextlib
import contextvars
from typing import NamedTuple

import haiku as hk

from powerprop_jax.jaxprs.dct import Method


class Form(NamedTuple):
  """What the layers of a network are like: arguments of nets.make.

  With has_transform every layer adds the fixed cosine transform of
  layers/dct.py to what its weights compute. First weights have variance times
  their usual variance.
  """

  has_transform: bool = False
  w_init: hk.initializers.Initializer | None = None
  method: Method = 'auto'
  variance: float = 1.0


_FORM: contextvars.ContextVar[Form | None] = contextvars.ContextVar(
  '_FORM', default=None
)


@contextlib.contextmanager
def use(form: Form) -> Iterator[None]:
  """Gives this form to the layers that layers.linear and layers.conv build.

  Example:
    >>> import jax
    >>> from powerprop_jax.nets import layers
    >>> def forward(x):
    ...   with use(Form(has_transform=True)):
    ...     return layers.linear(4, 'linear')(x)
    >>> net = hk.without_apply_rng(hk.transform(forward))
    >>> x = jax.numpy.ones((1, 4))
    >>> theta = net.init(jax.random.key(0), x)
    >>> sorted(theta['linear'])
    ['b', 'transform_scale', 'w']
    >>> abs(net.apply(theta, x).round(3))
    Array([[2., 0., 0., 0.]], dtype=float32)
  """
  token = _FORM.set(form)
  try:
    yield
  finally:
    _FORM.reset(token)


def current() -> Form:
  """The form in use; outside of any context the plain one."""
  return _FORM.get() or Form()
