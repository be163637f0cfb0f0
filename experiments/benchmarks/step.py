r"""What powerprop costs in a training step, and how fast the step is.

LeNet-300-100 on MNIST-sized images, batch 60, plain SGD, data on the device and
many steps per dispatch. The baseline is the dense step as anyone would write it
with Haiku and Optax, compiled as JAX comes; powerprop is compiled with the
flags that the programs of this library set (train/scale/fusing.py). Beside
them stands the same training loop in PyTorch, where that is installed. Each
group runs in a process of its own, in turn; the table gives medians over the
rounds, and ratios within a round.

    python -m experiments.benchmarks.step

The numbers that it gave are in docs/results/benchmarks.md.
"""

import dataclasses
import functools
import statistics
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import experiments
from experiments.benchmarks import harness
import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core import reparam
from powerprop_jax.core.trees import Tree
from powerprop_jax.files import tables
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import timing
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs import errors
from powerprop_jax.train.scale import fusing


@dataclasses.dataclass(frozen=True)
class Config:
  """Time of a training step, dense and with powerprop."""

  # Examples in a batch.
  batch_size: int = 60
  # Steps in one timed run, all in one dispatch.
  num_steps: int = 200
  # Timed runs of each variant in a round.
  repeats: int = 10
  # Rounds, in each of which every group has its turn.
  rounds: int = 5
  # Powers known when the step is compiled.
  alphas: tuple[float, ...] = (1.5, 2.0, 3.0)
  # The power given as an array.
  traced_alpha: float = 2.0
  # Threads for PyTorch; each is tried and the best one counts.
  torch_threads: tuple[int, ...] = (1, 2)


# Variants that share compiler settings; the first holds the baseline.
_GROUPS: dict[str, harness.Flags] = {
  'dense': 'none',
  'static': 'static',
  'traced': 'traced',
  'torch': 'none',
}


class _Times(NamedTuple):
  wall: float  # seconds per step
  cpu: float


def main(config: Config) -> None:
  """Prints the table."""
  errors.check_positive(
    config, 'batch_size', 'num_steps', 'repeats', 'rounds', 'torch_threads'
  )
  for alpha in (*config.alphas, config.traced_alpha):
    reparam.check_alpha(alpha)
  found: dict[str, list[_Times]] = {}
  for _ in range(config.rounds):
    for group, flags in _GROUPS.items():
      with harness.process_with(flags) as process:
        measured = process.submit(_measure, config, group).result()
      for name, times in measured.items():
        found.setdefault(name, []).append(times)
  _print(found, config)


def _measure(config: Config, group: str) -> dict[str, _Times]:
  """Medians of interleaved runs of the variants of a group."""
  rng = np.random.default_rng(0)
  arrays = Arrays(
    rng.integers(0, 256, (10_000, 28, 28, 1), np.uint8),
    rng.integers(0, 10, 10_000).astype(np.int32),
  )
  rng = np.random.default_rng(1)
  shape = (config.num_steps, config.batch_size)
  indices = rng.integers(0, len(arrays.labels), shape, np.int32)
  runs: dict[str, timing.Program] = {}
  if group == 'dense':
    runs['dense Haiku and Optax'] = _dense(arrays, indices)
  elif group == 'static':
    for alpha in config.alphas:
      runs[f'powerprop, α = {alpha:g}'] = _powerprop(arrays, indices, alpha)
  elif group == 'traced':
    alpha = config.traced_alpha
    traced = _powerprop(arrays, indices, jnp.float32(alpha))
    runs[f'powerprop, α = {alpha:g} traced'] = traced
  else:
    for threads in config.torch_threads:
      runs |= _torch(arrays, indices, threads)
  return {
    name: _Times(
      statistics.median(times.wall) / config.num_steps,
      statistics.median(times.cpu) / config.num_steps,
    )
    for name, times in timing.take_turns(runs, config.repeats).items()
  }


def _dense(arrays: Arrays, indices: np.ndarray) -> timing.Program:
  """The plain step: Haiku, Optax, jit, scan."""
  net = nets.make('lenet_300_100', 10)
  tx = optax.sgd(0.1)

  def loss_fn(
    theta: hk.Params, images: jax.Array, labels: jax.Array
  ) -> jax.Array:
    logits, _ = net.apply(theta, {}, None, images, is_training=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)

  def body(carry: Tree, batch: jax.Array, arrays: Arrays) -> Any:
    theta, opt_state = carry
    images = arrays.images[batch].astype(jnp.float32) / 255
    loss, grads = jax.value_and_grad(loss_fn)(
      theta, images, arrays.labels[batch]
    )
    updates, opt_state = tx.update(grads, opt_state, theta)
    return (optax.apply_updates(theta, updates), opt_state), loss

  @functools.partial(jax.jit, donate_argnums=0)
  def advance(carry: Tree, arrays: Arrays, indices: jax.Array) -> Any:
    return jax.lax.scan(
      lambda carry, batch: body(carry, batch, arrays), carry, indices
    )

  theta, _ = net.init(jax.random.key(0), arrays.images[:1] / 255.0, True)
  carry = (theta, tx.init(theta))
  on_device = jax.device_put(arrays)
  return harness.going_on(advance, lambda: carry, [(on_device, indices)])


def _powerprop(
  arrays: Arrays, indices: np.ndarray, alpha: Any
) -> timing.Program:
  """What the programs of this library run."""
  net = nets.make('lenet_300_100', 10)
  tx = pp.powerprop(optax.sgd(0.1), alpha)
  images = jnp.asarray(arrays.images[:1] / 255.0)
  first = step_lib.create(net, tx, jax.random.key(0), images)
  advance = jax.jit(
    fusing.make_advance(net, fusing.fused(tx)), donate_argnums=0
  )
  on_device = jax.device_put(arrays)
  return harness.going_on(advance, lambda: first, [(on_device, indices)])


def _torch(
  arrays: Arrays, indices: np.ndarray, threads: int
) -> dict[str, timing.Program]:
  """The plain dense loop in PyTorch, or nothing where it is missing."""
  try:
    import torch
  except ImportError:
    return {}
  images = torch.from_numpy(arrays.images.reshape(-1, 784))
  labels = torch.from_numpy(arrays.labels.astype(np.int64))
  net = torch.nn.Sequential(
    torch.nn.Linear(784, 300),
    torch.nn.ReLU(),
    torch.nn.Linear(300, 100),
    torch.nn.ReLU(),
    torch.nn.Linear(100, 10),
  )
  optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

  def run() -> None:
    torch.set_num_threads(threads)
    for batch in torch.from_numpy(indices.astype(np.int64)):
      logits = net(images[batch].float() / 255)
      loss = torch.nn.functional.cross_entropy(logits, labels[batch])
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()

  return {f'dense PyTorch, {threads} threads': run}


def _print(found: dict[str, list[_Times]], config: Config) -> None:
  walls, cpus = (
    {name: [getattr(t, kind) for t in rounds] for name, rounds in found.items()}
    for kind in ('wall', 'cpu')
  )
  base = next(iter(found))
  print(
    f'LeNet-300-100, batch {config.batch_size}, SGD; medians over '
    f'{config.rounds} rounds of {config.repeats} runs of {config.num_steps} '
    f'steps.\n{timing.environment()}\n'
  )
  rows = [
    {
      'step': name,
      'µs': round(1e6 * statistics.median(walls[name])),
      'ratio': round(timing.median_ratio(walls[name], walls[base]), 3),
      'CPU_µs': round(1e6 * statistics.median(cpus[name])),
      'CPU_ratio': round(timing.median_ratio(cpus[name], cpus[base]), 3),
      'steps/CPU-s': round(1 / statistics.median(cpus[name])),
    }
    for name in found
  ]
  print(tables.text_table(rows))


if __name__ == '__main__':
  experiments.start(main, {'default': Config()})
