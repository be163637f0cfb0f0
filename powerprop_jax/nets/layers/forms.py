"""How a network holds its weights: one choice for all of its layers.

Plain, with a fixed cosine transform beside them, or without their zeros. The
choice reaches layers.linear and layers.conv through a context, so that every
network is written once.
"""

from collections.abc import Iterator, Mapping
import contextlib
import contextvars
from typing import NamedTuple

import haiku as hk

from powerprop_jax.sparse.weight import Support


class Form(NamedTuple):
  """How the layers of a network hold their weights: arguments of nets.make.

  With has_transform every layer adds the fixed cosine transform of
  layers/dct.py to what its weights compute.
  """

  has_transform: bool = False
  w_init: hk.initializers.Initializer | None = None
  supports: Mapping[str, Support] | None = None
  method: str = 'auto'


class _Context(NamedTuple):
  """The form, and the supports that no layer has taken yet."""

  form: Form
  unused: dict[str, Support]


_CONTEXT: contextvars.ContextVar[_Context | None] = contextvars.ContextVar(
  '_CONTEXT', default=None
)


@contextlib.contextmanager
def use(form: Form) -> Iterator[None]:
  """Gives this form to the layers that layers.linear and layers.conv build.

  Raises:
    ValueError: at the end of the context, if a support was for a layer that was
      not built.

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
  context = _Context(form, dict(form.supports or {}))
  token = _CONTEXT.set(context)
  try:
    yield
  finally:
    _CONTEXT.reset(token)
  if context.unused:
    raise ValueError(
      f'there is a support for {", ".join(context.unused)}, but no layer of '
      'this network has such a weight. Take the supports from masks of the '
      'same network.'
    )


def take(name: str) -> tuple[Form, Support | None]:
  """The form in use, and the support of a layer that is about to be built.

  Outside of any context the form is the plain one.
  """
  context = _CONTEXT.get()
  if context is None:
    return Form(), None
  scope = hk.current_name()
  path = f'{name}/w' if scope == '~' else f'{scope}/{name}/w'
  context.unused.pop(path, None)
  return context.form, (context.form.supports or {}).get(path)
