"""What must work wherever the library is installed: python tests/smoke.py

A network is trained sparse, written into a file, read back and run without its
zeros; the command `powerprop` does the same, or says what it lacks. All in an
empty folder, and with nothing of this repository but this file.
"""

import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax

import powerprop_jax as pp
from powerprop_jax.export import export


def forward(theta, images):
  """Logits of a network with one hidden layer."""
  hidden = jax.nn.relu(images @ theta['hidden']['w'] + theta['hidden']['b'])
  return hidden @ theta['logits']['w'] + theta['logits']['b']


def train():
  """θ and masks of a tenth of the connections; the loss halves at least."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(256, 64)).astype(np.float32)
  labels = np.argmax(images @ rng.normal(size=(64, 10)), axis=1)
  weight = lambda *shape: rng.normal(size=shape).astype(np.float32) / 8
  theta = {
    'hidden': {'w': weight(64, 128), 'b': np.zeros(128, np.float32)},
    'logits': {'w': weight(128, 10), 'b': np.zeros(10, np.float32)},
  }
  inner = pp.powerprop(optax.adam(1e-2), alpha=2.0)
  tx = pp.rigl(inner, sparsity=0.9, period=20, stop=150)

  def loss_fn(theta):
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(forward(theta, images), labels).mean()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(phi, opt_state):
    theta = pp.effective_params(phi, opt_state)
    loss, grads = jax.value_and_grad(loss_fn)(theta)
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state, loss

  phi, opt_state = pp.init(tx, jax.tree.map(jnp.asarray, theta))
  losses = []
  for _ in range(200):
    phi, opt_state, loss = step(phi, opt_state)
    losses.append(float(loss))
  assert losses[-1] < losses[0] / 2, losses[:: len(losses) - 1]
  masks = pp.current_masks(phi, opt_state)
  density = pp.masks.density(masks, select=pp.is_weight)
  assert abs(density - 0.1) < 1e-3, density
  return pp.effective_params(phi, opt_state), masks, images


def write_and_read(format):
  """A network comes back from its file exactly, and skips its zeros."""
  theta, masks, images = train()
  network = export.Exported(theta, masks, {}, about={'net': 'smoke'})
  path = export.write('net', network, format=format)
  restored, kept, _, about = export.read(path)
  assert about['net'] == 'smoke'
  jax.tree.map(np.testing.assert_array_equal, restored, theta)
  jax.tree.map(np.testing.assert_array_equal, kept, masks)
  sparse = pp.without_zeros(
    forward, kept, restored, images, execution='condensed'
  )
  np.testing.assert_allclose(
    sparse(pp.condense(restored, kept), images),
    forward(theta, images),
    rtol=1e-4,
    atol=1e-4,
  )


def run(*args):
  """What a command printed, and its exit status."""
  done = subprocess.run(args, capture_output=True, text=True)
  return done.returncode, done.stdout, done.stderr


def main():
  """Everything, with as much of the command as is installed."""
  version = importlib.metadata.version('powerprop_jax')
  assert version == pp.__version__, (version, pp.__version__)
  has_programs = importlib.util.find_spec('tyro') is not None
  write_and_read('safetensors' if has_programs else 'npz')

  status, out, err = run('powerprop', '--version')
  if not has_programs:
    (line,) = err.splitlines()
    assert status == 2 and "pip install 'powerprop_jax[train]'" in line, err
    return f'{version}, without programs'
  assert (status, out) == (0, f'powerprop_jax {version}\n'), (out, err)
  for command in (
    'train --out run --method rigl --sparsity 0.9 --loop.num-steps 300',
    'export run',
  ):
    status, out, err = run('powerprop', *command.split())
    assert status == 0, err
  return version


if __name__ == '__main__':
  with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    print(f'{pathlib.Path(pp.__file__).parent}: {main()}')
