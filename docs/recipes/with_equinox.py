"""Equinox: sparse training, without its zeros, exported.

python docs/recipes/with_equinox.py
"""

import pathlib
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import powerprop_jax as pp
from powerprop_jax.export import export, exported

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)

model = eqx.nn.MLP(64, 10, 300, depth=1, key=jax.random.key(0))
theta, rest = eqx.partition(model, eqx.is_inexact_array)
fn = lambda theta, x: jax.vmap(eqx.combine(theta, rest))(x)

sparse = pp.rigl(pp.powerprop(optax.adam(0.01), alpha=2.0), 0.9, stop=300)
tx = pp.drop_in(sparse)
opt_state = tx.init(theta)


@jax.jit
def step(theta, opt_state, x, y):
  """One step, as without sparsity."""
  loss = lambda theta: jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(fn(theta, x), y)
  )
  updates, opt_state = tx.update(jax.grad(loss)(theta), opt_state, theta)
  return optax.apply_updates(theta, updates), opt_state


for rows in np.random.default_rng(0).integers(0, 1500, (400, 100)):
  theta, opt_state = step(theta, opt_state, images[rows], labels[rows])
masks = pp.current_masks(theta, opt_state)
right = fn(theta, images[1500:]).argmax(axis=1) == labels[1500:]
print('accuracy', jnp.mean(right))

# The same function of the connections alone, and one file of them.
run = jax.jit(pp.without_zeros(fn, masks, theta, images[1500:]))
path = pathlib.Path(tempfile.mkdtemp()) / 'net.safetensors'
export.write(path, exported.Exported(theta, masks, {}, {'alpha': 2.0}))
back = exported.restored(export.read(path).theta, theta)
logits = run(pp.condense(back, masks), images[1500:])
print('again', jnp.mean(logits.argmax(axis=1) == labels[1500:]), path)
