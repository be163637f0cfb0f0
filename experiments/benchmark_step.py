r"""What powerprop costs in a training step, and how fast the step is.

LeNet-300-100 on MNIST-sized images, batch 60, plain SGD, data on the device and
many steps per dispatch. The baseline is the dense step as anyone would write it
with Haiku and Optax, compiled as JAX comes; powerprop is compiled with the
flags that the programs of this library set (train/xla_flags.py). Beside them
stands the same training loop in PyTorch, where that is installed. Each group
runs in a process of its own, in turn; the table gives medians over the rounds,
and ratios within a round.

    python -m experiments.benchmark_step

The numbers that it gave are in experiments/README.md.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import functools
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from powerprop_jax import nets
from powerprop_jax.optim import powerprop
from powerprop_jax.train import command, state, step, xla_flags
from powerprop_jax.train.data_sources import Arrays


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


# Runs num_steps steps on rows of the data, to the end.
Run = Callable[[np.ndarray], None]

# Variants that share compiler settings; the first holds the baseline.
_GROUPS = ('dense', 'static', 'traced', 'torch')


class _Times(NamedTuple):
  wall: float  # seconds per step
  cpu: float


def main(config: Config) -> None:
  """Prints the table."""
  found: dict[str, list[_Times]] = {}
  for _ in range(config.rounds):
    for group in _GROUPS:
      for name, times in _in_own_process(config, group).items():
        found.setdefault(name, []).append(times)
  _print(found, config)


def _in_own_process(config: Config, group: str) -> dict[str, _Times]:
  """Times a group of variants in a process with the group's XLA flags.

  XLA reads its flags once a process, and those that make powerprop fast make
  the dense step slower: the baseline must not be compiled with them.
  """
  before = os.environ.get('XLA_FLAGS')
  os.environ['XLA_FLAGS'] = ''
  if group in ('static', 'traced'):
    xla_flags.set_cpu_flags(os.environ, static_alpha=group == 'static')
  try:
    context = multiprocessing.get_context('spawn')
    with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
      return pool.submit(_measure, config, group).result()
  finally:
    os.environ.pop('XLA_FLAGS')
    if before is not None:
      os.environ['XLA_FLAGS'] = before


def _measure(config: Config, group: str) -> dict[str, _Times]:
  """Medians of interleaved runs of the variants of a group."""
  rng = np.random.default_rng(0)
  arrays = Arrays(
    rng.integers(0, 256, (10_000, 28, 28, 1), np.uint8),
    rng.integers(0, 10, 10_000).astype(np.int32),
  )
  runs: dict[str, Run] = {}
  if group == 'dense':
    runs['dense Haiku and Optax'] = _dense(arrays)
  elif group == 'static':
    for alpha in config.alphas:
      runs[f'powerprop, α = {alpha:g}'] = _powerprop(arrays, alpha)
  elif group == 'traced':
    alpha = config.traced_alpha
    traced = _powerprop(arrays, jnp.float32(alpha))
    runs[f'powerprop, α = {alpha:g} traced'] = traced
  else:
    for threads in config.torch_threads:
      runs |= _torch(arrays, threads)
  return _time(runs, config, len(arrays.labels))


def _dense(arrays: Arrays) -> Run:
  """The plain step: Haiku, Optax, jit, scan."""
  net = nets.make('lenet_300_100', 10)
  tx = optax.sgd(0.1)

  def loss_fn(
    theta: hk.Params, images: jax.Array, labels: jax.Array
  ) -> jax.Array:
    logits, _ = net.apply(theta, {}, None, images, is_training=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)

  def body(carry: Any, batch: jax.Array, arrays: Arrays) -> Any:
    theta, opt_state = carry
    images = arrays.images[batch].astype(jnp.float32) / 255
    loss, grads = jax.value_and_grad(loss_fn)(
      theta, images, arrays.labels[batch]
    )
    updates, opt_state = tx.update(grads, opt_state, theta)
    return (optax.apply_updates(theta, updates), opt_state), loss

  @functools.partial(jax.jit, donate_argnums=0)
  def advance(carry: Any, arrays: Arrays, indices: jax.Array) -> Any:
    return jax.lax.scan(
      lambda carry, batch: body(carry, batch, arrays), carry, indices
    )

  theta, _ = net.init(jax.random.key(0), arrays.images[:1] / 255.0, True)
  on_device = jax.device_put(arrays)
  carry = (theta, tx.init(theta))

  def run(indices: np.ndarray) -> None:
    nonlocal carry
    carry, _ = advance(carry, on_device, indices)
    jax.block_until_ready(carry)

  return run


def _powerprop(arrays: Arrays, alpha: Any) -> Run:
  """What the programs of this library run."""
  net = nets.make('lenet_300_100', 10)
  tx = powerprop.powerprop(optax.sgd(0.1), alpha)
  images = jnp.asarray(arrays.images[:1] / 255.0)
  current = state.create(net, tx, jax.random.key(0), images)
  advance = jax.jit(
    step.make_advance(net, tx, repeat_update=True), donate_argnums=0
  )
  on_device = jax.device_put(arrays)

  def run(indices: np.ndarray) -> None:
    nonlocal current
    current, _ = advance(current, on_device, indices)
    jax.block_until_ready(current)

  return run


def _torch(arrays: Arrays, threads: int) -> dict[str, Run]:
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

  def run(indices: np.ndarray) -> None:
    torch.set_num_threads(threads)
    for batch in torch.from_numpy(indices.astype(np.int64)):
      logits = net(images[batch].float() / 255)
      loss = torch.nn.functional.cross_entropy(logits, labels[batch])
      optimizer.zero_grad()
      loss.backward()
      optimizer.step()

  return {f'dense PyTorch, {threads} threads': run}


def _time(
  runs: dict[str, Run], config: Config, num_examples: int
) -> dict[str, _Times]:
  """Medians of the wall and CPU seconds per step of every variant."""
  rng = np.random.default_rng(1)
  wall: dict[str, list[float]] = {name: [] for name in runs}
  cpu: dict[str, list[float]] = {name: [] for name in runs}
  for repeat in range(config.repeats + 1):
    for name, run in runs.items():
      indices = rng.integers(
        0, num_examples, (config.num_steps, config.batch_size), np.int32
      )
      cpu_start, wall_start = time.process_time(), time.perf_counter()
      run(indices)
      if repeat:  # the first one compiles
        wall[name].append(time.perf_counter() - wall_start)
        cpu[name].append(time.process_time() - cpu_start)
  return {
    name: _Times(
      statistics.median(wall[name]) / config.num_steps,
      statistics.median(cpu[name]) / config.num_steps,
    )
    for name in runs
  }


def _print(found: dict[str, list[_Times]], config: Config) -> None:
  base = next(iter(found.values()))
  print(
    f'LeNet-300-100, batch {config.batch_size}, SGD; medians over '
    f'{config.rounds} rounds of {config.repeats} runs of {config.num_steps} '
    f'steps; jax {jax.__version__}, {os.cpu_count()} CPU cores, '
    f'{jax.default_backend()}\n'
  )
  print(f'{"":28} µs/step  ratio  CPU µs/step  ratio  steps/CPU-s')
  for name, rounds in found.items():
    wall, cpu = map(statistics.median, zip(*rounds, strict=True))
    ratio_wall, ratio_cpu = (
      statistics.median(a[i] / b[i] for a, b in zip(rounds, base, strict=True))
      for i in range(2)
    )
    print(
      f'{name:28} {wall * 1e6:7.0f}  {ratio_wall:5.3f}  '
      f'{cpu * 1e6:11.0f}  {ratio_cpu:5.3f}  {1 / cpu:11.0f}'
    )


if __name__ == '__main__':
  sys.exit(
    command.run(
      main,
      {'default': Config()},
      prog='python -m experiments.benchmark_step',
      description=str(__doc__).split('\n', maxsplit=1)[0],
    )
  )
