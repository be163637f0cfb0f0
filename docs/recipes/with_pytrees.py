"""Plain pytrees: sparse training, without its zeros, exported.

python docs/recipes/with_pytrees.py
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import powerprop_jax as pp
from powerprop_jax.export import export, exported

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)

draw = lambda n, m: jax.random.normal(jax.random.key(n), (n, m)) / n**0.5
theta = [
  {'w': draw(n, m), 'b': jnp.zeros(m)} for n, m in ((64, 300), (300, 10))
]


def fn(theta, x):
  """Logits of images."""
  x = jax.nn.relu(x @ theta[0]['w'] + theta[0]['b'])
  return x @ theta[1]['w'] + theta[1]['b']


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
