"""Flax NNX under nnx.Optimizer: sparse, without its zeros, exported.

python docs/recipes/with_nnx.py
"""

import pathlib
import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import powerprop_jax as pp
from powerprop_jax.export import export, exported

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)

rngs = nnx.Rngs(0)
layers = (
  nnx.Linear(64, 300, rngs=rngs),
  nnx.relu,
  nnx.Linear(300, 10, rngs=rngs),
)
model = nnx.Sequential(*layers)
sparse = pp.rigl(pp.powerprop(optax.adam(0.01), alpha=2.0), 0.9, stop=300)
optimizer = nnx.Optimizer(model, pp.drop_in(sparse), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer, x, y):
  """One step, as without sparsity."""
  loss = lambda model: jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(model(x), y)
  )
  optimizer.update(model, nnx.grad(loss)(model))


for rows in np.random.default_rng(0).integers(0, 1500, (400, 100)):
  step(model, optimizer, images[rows], labels[rows])
graph, theta = nnx.split(model)
fn = lambda theta, x: nnx.merge(graph, theta)(x)
masks = jax.tree.map(lambda w: w != 0, theta)
right = fn(theta, images[1500:]).argmax(axis=1) == labels[1500:]
print('accuracy', jnp.mean(right))

# The same function of the connections alone, and one file of them.
run = jax.jit(pp.without_zeros(fn, masks, theta, images[1500:]))
path = pathlib.Path(tempfile.mkdtemp()) / 'net.safetensors'
export.write(path, exported.Exported(theta, masks, {}, {'alpha': 2.0}))
back = exported.restored(export.read(path).theta, theta)
logits = run(pp.condense(back, masks), images[1500:])
print('again', jnp.mean(logits.argmax(axis=1) == labels[1500:]), path)
