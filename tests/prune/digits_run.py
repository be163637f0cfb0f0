"""A small network on digits, its training under masks, and its accuracy."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from powerprop_jax.core import masks
from powerprop_jax.optim import powerprop, views
from powerprop_jax.train.data import splits as data

NUM_STEPS = 250


def make(alpha, sizes=(100, 10), learning_rate=0.2):
  """(network, θ_0, loss of (θ, images, labels), examples, train, accuracy)."""
  splits = data.load(data.DataConfig('digits'))
  arrays = jax.device_put(splits.train)
  net = hk.without_apply_rng(
    hk.transform(lambda x: hk.nets.MLP(sizes)(hk.Flatten()(x)))
  )
  rate = optax.piecewise_constant_schedule(learning_rate, {200: 0.2})

  def loss_fn(theta, images, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(
      net.apply(theta, images), labels
    )
    return jnp.mean(losses)

  @jax.jit
  def run(theta, kept, start_step, batches):
    sgd = optax.sgd(lambda step: rate(step + start_step), momentum=0.9)
    tx = powerprop.powerprop(sgd, alpha)

    def step(carry, batch):
      phi, opt_state = carry
      theta = views.effective_params(phi, opt_state)
      batch = arrays.images[batch], arrays.labels[batch]
      grads = masks.apply_masks(jax.grad(loss_fn)(theta, *batch), kept)
      updates, opt_state = tx.update(grads, opt_state, phi)
      return (optax.apply_updates(phi, updates), opt_state), None

    (phi, opt_state), _ = jax.lax.scan(step, views.init(tx, theta), batches)
    return views.effective_params(phi, opt_state)

  def train(theta, kept, start_step, stop=NUM_STEPS):
    # Fine-tuning starts at the end: as many steps again, at the last rate.
    num_steps = (stop - start_step) or NUM_STEPS
    batches = data.batch_indices(0, start_step, num_steps, 60, 1197)
    return run(theta, kept, start_step, batches)

  def accuracy(theta):
    logits = net.apply(theta, splits.test.images)
    return float(jnp.mean(jnp.argmax(logits, -1) == splits.test.labels))

  theta_0 = net.init(jax.random.key(0), arrays.images[:1])
  return net, theta_0, loss_fn, splits.train, train, accuracy
