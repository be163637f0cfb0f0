"""Small trees and their training, eight devices, and the slowest top-k."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np
import optax

from powerprop_jax import nets
from powerprop_jax.optim import views

# The networks that look at images.
IMAGE_NETS = tuple(n for n in nets.NAMES if n not in nets.TEXT_NAMES)

# To be ranked: two zeros that are ties, NaNs of both signs, and a subnormal.
ODD_NUMBERS = (
  *(0.0, -0.0, 1.0, -1.0, 2.5),
  *(np.nan, -np.nan, np.inf, -np.inf, 1e-42),
)


def normal(shapes, seed=0, dtype=jnp.float32):
  """Random numbers of these shapes, {module: {name: shape}}."""
  rng = np.random.default_rng(seed)
  return {
    module: {
      name: jnp.asarray(rng.normal(size=shape), dtype)
      for name, shape in leaves.items()
    }
    for module, leaves in shapes.items()
  }


def two_layers(a, n, dtype=jnp.float32):
  """A layer 'a' with a bias, and a layer 'n' without one."""
  shapes = {'a': {'w': a, 'b': a[-1:]}, 'n': {'w': n}}
  return normal(shapes, dtype=dtype)


def weights(scale=1.0):
  """θ of a network of two layers, 'm' and 'n', as inners.py names them."""
  keys = jax.random.split(jax.random.key(0), 3)
  draw = lambda key, shape: scale * jax.random.normal(key, shape)
  return {
    'm': {'w': draw(keys[0], (6, 5)), 'b': draw(keys[1], (5,))},
    'n': {'w': draw(keys[2], (5, 4))},
  }


def loss(theta):
  hidden = jnp.tanh(jnp.eye(6) @ theta['m']['w'] + theta['m']['b'][None])
  return jnp.mean((hidden @ theta['n']['w'] - 1.0) ** 2)


def step(tx, phi, state):
  grads = jax.grad(loss)(views.effective_params(phi, state))
  updates, state = tx.update(grads, state, phi)
  return optax.apply_updates(phi, updates), state


def run(tx, num_steps, theta=None):
  """(φ, state) at the start and after each step down the loss."""
  compiled = jax.jit(functools.partial(step, tx))
  entries = [views.init(tx, weights() if theta is None else theta)]
  for _ in range(num_steps):
    entries.append(compiled(*entries[-1]))
  return entries


def grads(i, like):
  return optax.tree.random_like(jax.random.key(i), like, jax.random.normal)


def history(tx, theta, num_steps, make_grads=None):
  """(φ, state) at the start and after each update, by random gradients."""
  entries = [views.init(tx, theta)]
  update = jax.jit(lambda grads, state, phi: tx.update(grads, state, phi))
  for i in range(num_steps):
    phi, state = entries[-1]
    given = make_grads(i) if make_grads else grads(i, phi)
    updates, state = update(given, state, phi)
    entries.append((optax.apply_updates(phi, updates), state))
  return entries


def on_devices(tree, specs, explicit):
  """A mesh of four by two devices, 'x' by 'y', and a tree sharded over it."""
  mesh = (
    jax.make_mesh((4, 2), ('x', 'y'))
    if explicit
    else Mesh(np.array(jax.devices()).reshape(4, 2), ('x', 'y'))
  )
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  return mesh, jax.tree.map(put, tree, specs)


def net_shapes(net, image_shape=(32, 32, 3)):
  """Parameters and state of a network as shapes, computing nothing."""
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  init = lambda key, x: net.init(key, x, True)
  return jax.eval_shape(init, jax.random.key(0), images)


def conv(x, w, stride=1, padding='SAME'):
  """A convolution of [N, H, W, C] in plain JAX."""
  dims = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(
    x, w, (stride, stride), padding, dimension_numbers=dims
  )


def largest(leaves, k, among=None):
  """Flat mask of the k largest by a stable sort, NaN last, if eligible."""
  flat_of = lambda arrays: np.concatenate([np.ravel(x) for x in arrays])
  with np.errstate(invalid='ignore'):  # signalling NaNs
    flat = flat_of([np.asarray(x, np.float64) for x in leaves])
  eligible = np.ones(flat.shape, bool) if among is None else flat_of(among)
  number = np.where(np.isnan(flat), -np.inf, flat)
  # The last key is the most important one; the sort is stable.
  order = np.lexsort((-number, np.isnan(flat), ~eligible))
  mask = np.zeros(flat.shape, bool)
  mask[order[: max(k, 0)]] = True
  return mask & eligible


def largest_of_all(arrays, k, among=None):
  """The same in the shapes of the arrays, which are ranked together."""
  ends = np.cumsum([np.size(x) for x in arrays])[:-1]
  parts = np.split(largest(arrays, k, among), ends)
  return [m.reshape(np.shape(x)) for m, x in zip(parts, arrays, strict=True)]


class ListWriter:
  """A writer that keeps what it gets, see train/runs/writers.py."""

  def __init__(self):
    self.written = []
    self.is_closed = False

  def write(self, step, values):
    assert not self.is_closed
    self.written.append((step, values))

  def close(self):
    self.is_closed = True
