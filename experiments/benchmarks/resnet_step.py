r"""What sparse training costs on ResNet-50: steady steps, and rewiring.

    python -m experiments.benchmarks.resnet_step
    python -m experiments.benchmarks.resnet_step --device gpu

The first runs on a CPU, with images of 64×64 in batches of 16; the second on a
GPU, with images of 224×224 in batches of 256, in bfloat16, and says so where no
GPU is to be had. Random images lie on the device.

plain   the step as anyone would write it with Haiku and Optax: SGD with
        momentum, no guard, no metrics.
dense   our step of the same: what experiments/imagenet_resnet50 runs.
METHOD  the same with a method, uniform, in a step that rewires nothing.
METHOD, rewires
        the same where every step rewires, for the methods that do.

All take turns in one process, with the compiler's settings that
experiments/imagenet_resnet50 has, `plain` too. `/ dense` is the median of
ratios of neighbouring runs; `cpu / dense` that of the time of all cores, which
says more on a machine where others disturb, and nothing of a GPU. `amortised`
is what rewiring adds to a step on average, once in --period steps, as a share
of the dense step. `of peak` is the share of --peak that the 4.089e9
multiplications and additions of an image at 224×224 make, counted three times;
--peak is in TFLOP/s, of the device and the precision. `first s` is the first
run, with the initial state and all that must be compiled.

The program compiles one step for each row, which takes one or two minutes on
two CPU cores, and runs for three quarters of an hour there with all methods.
"""

import dataclasses
import functools
import statistics
from typing import Any, Literal

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import experiments
from experiments.benchmarks import harness
from experiments.imagenet_resnet50 import config as imagenet
from experiments.imagenet_resnet50 import setup
from experiments.imagenet_resnet50.config import (
  NetConfig,
  RecipeConfig,
  ScheduleConfig,
)
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train import progress as progress_lib
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import timing
from powerprop_jax.train.methods import SparseConfig
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import guard
from powerprop_jax.train.scale.precision import Half

# Steps of a run so long that its first period is never over.
_NEVER = 10**8
# Multiplications and additions of ResNet-50 at 224×224.
_FLOPS = 2 * 4_089_184_256
_REWIRED = ('pruning', 'set', 'rigl', 'snfs', 'top_kast')
METHODS = ('static', *_REWIRED)


@dataclasses.dataclass(frozen=True)
class Config:
  """Time of steps of ResNet-50, sparse and dense."""

  # 'cpu' or 'gpu': which sizes the settings below have by default.
  device: Literal['cpu', 'gpu'] = 'cpu'
  # Methods beside the dense step.
  methods: tuple[str, ...] = METHODS
  # Powers to measure each of them with.
  alphas: tuple[float, ...] = (1.0, 1.5)
  # Share of zeros.
  sparsity: float = 0.9
  # Examples in a batch. Default: 16, or 256 on a GPU.
  batch: int | None = None
  # Side of the images. Default: 64, or 224 on a GPU.
  image_size: int | None = None
  # What layers compute with. Default: 'none', or 'bfloat16' on a GPU.
  half: Half | None = None
  # Layers and width of the network.
  depth: Literal[10, 18, 50] = 50
  width: float = 1.0
  # Classes.
  num_classes: int = 1000
  # Steps in a timed run.
  steps: int = 2
  # Timed runs of each.
  repeats: int = 7
  # Steps from one rewiring to the next, over which its cost is spread.
  period: int = 100
  # Whether to measure rewiring too.
  rewiring: bool = True
  # TFLOP/s that the device can do at most. Default: share of peak not given.
  peak: float | None = None


def main(config: Config) -> None:
  """Prints a table."""
  _check(config)
  if config.device == 'gpu' and jax.default_backend() != 'gpu':
    print(
      f'There is no GPU here: JAX runs on {jax.default_backend()}. Nothing was '
      'measured; --device cpu runs at a size for a CPU.'
    )
    return
  is_gpu = config.device == 'gpu'
  config = dataclasses.replace(
    config,
    batch=config.batch or (256 if is_gpu else 16),
    image_size=config.image_size or (224 if is_gpu else 64),
    half=config.half or ('bfloat16' if is_gpu else 'none'),
  )
  print(
    f'ResNet-{config.depth}, batch {config.batch} of {config.image_size}×'
    f'{config.image_size}, half {config.half}, sparsity {config.sparsity:g}; '
    f'medians of {config.repeats} interleaved runs of {config.steps} steps.\n'
    f'{timing.environment()}\n'
  )
  programs = _programs(config)
  num_runs = len(programs) * (config.repeats + 1)
  with progress_lib.Progress('measuring', num_runs, unit='runs') as progress:
    times = timing.take_turns(programs, config.repeats, progress.update)
  print(tables.text_table(rows(config, times)))


def _check(config: Config) -> None:
  errors.check_positive(
    config, 'num_classes', 'batch', 'image_size', 'steps', 'repeats', 'period'
  )
  harness.check_known(config, 'methods', METHODS)
  if config.peak is not None and not config.peak > 0:
    raise UserError(f'--peak must be positive, got {config.peak}.')


def rows(config: Config, times: dict[str, timing.Times]) -> list[Row]:
  """What times of runs of config.steps steps, by their name, amount to."""
  assert config.batch is not None and config.image_size is not None
  _, dense, dense_cpu = times['dense']
  found = []
  for name, (first, wall, cpu) in times.items():
    seconds = statistics.median(wall) / config.steps
    rate = config.batch / seconds
    row: Row = {
      'step': name,
      'ms': round(1e3 * seconds, 2),
      '/ dense': round(timing.median_ratio(wall, dense), 3),
      'cpu / dense': round(timing.median_ratio(cpu, dense_cpu), 3),
      'images/s': round(rate, 1),
      'amortised': None,
      'first_s': round(first, 1),
    }
    steady = name.removesuffix(', rewires')
    if steady != name:
      added = [
        (a - b) / (c * config.period)
        for a, b, c in zip(wall, times[steady].wall, dense, strict=True)
      ]
      row['amortised'] = round(statistics.median(added), 5)
    if config.peak is not None:
      # An image of another size takes work in proportion to its pixels.
      flops = 3 * _FLOPS * (config.image_size / 224) ** 2 * rate
      row['of peak'] = round(flops / (config.peak * 1e12), 3)
    found.append(row)
  return found


def _programs(config: Config) -> dict[str, timing.Program]:
  """All steps of the table, each with a state of its own."""
  net = setup.make_net(
    NetConfig(config.depth, config.width, config.half or 'none'),
    config.num_classes,
  )
  assert config.batch is not None and config.image_size is not None
  side = config.image_size
  key = jax.random.key(0)
  images = jax.random.randint(
    key, (config.batch, side, side, 3), 0, 256, jnp.uint8
  )
  labels = jax.random.randint(key, (config.batch,), 0, config.num_classes)
  theta = setup.shapes(net, side)
  recipe = RecipeConfig(
    batch_size=config.batch,
    num_steps=_NEVER,
    schedule=ScheduleConfig(learning_rate=0.01, warmup=0.0),
  )
  batches = [(images, labels)] * config.steps
  programs = {'plain': _plain(net, recipe, batches)}
  plan: list[tuple[str, str, float, int]] = [('dense', 'dense', 1.0, 1)]
  for alpha in config.alphas:
    for method in config.methods:
      name = method if alpha == 1 else f'{method}, α = {alpha:g}'
      plan.append((name, method, alpha, _NEVER // 2))
      if config.rewiring and method in _REWIRED:
        plan.append((f'{name}, rewires', method, alpha, 1))
  for name, method, alpha, period in plan:
    settings = imagenet.Config(
      method=method,  # type: ignore[arg-type]
      sparsity=config.sparsity if method != 'dense' else 0.0,
      allocation='uniform',
      alpha=alpha,
      recipe=recipe,
      sparse=SparseConfig(stop=1.0, period=period, pruning_start=0.0),
    )
    # An epoch of many steps, so that the stairs do not fall.
    tx = setup.make_tx(settings, config.batch * _NEVER, theta)
    programs[name] = _ours(net, tx, recipe, batches)
  return programs


def _ours(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  recipe: RecipeConfig,
  batches: list[tuple[jax.Array, jax.Array]],
) -> timing.Program:
  """Goes some steps on, each a dispatch, as stream_loop does."""
  step = guard.guarded(setup.make_step(net, tx, recipe))
  first = setup.normalise(batches[0][0][:1])
  create = jax.jit(
    lambda key: guard.create(step_lib.create(net, tx, key, first))
  )
  return harness.going_on(
    jax.jit(step, donate_argnums=0),
    lambda: create(jax.random.key(0)),
    batches,
  )


def _plain(
  net: hk.TransformedWithState,
  recipe: RecipeConfig,
  batches: list[tuple[jax.Array, jax.Array]],
) -> timing.Program:
  """The step with nothing of ours but the network."""
  tx = optax.sgd(0.01, recipe.momentum, recipe.nesterov)

  def loss_fn(
    theta: Params, net_state: Tree, images: jax.Array, labels: jax.Array
  ) -> Any:
    logits, net_state = net.apply(
      theta, net_state, None, setup.normalise(images), True
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses), net_state

  @functools.partial(jax.jit, donate_argnums=0)
  def step(carry: Tree, images: jax.Array, labels: jax.Array) -> Any:
    theta, net_state, opt_state = carry
    grads, net_state = jax.grad(loss_fn, has_aux=True)(
      theta, net_state, images, labels
    )
    updates, opt_state = tx.update(grads, opt_state)
    return (optax.apply_updates(theta, updates), net_state, opt_state), None

  @jax.jit
  def create(key: jax.Array) -> Tree:
    first = setup.normalise(batches[0][0][:1])
    theta, net_state = net.init(key, first, True)
    return theta, net_state, tx.init(theta)

  return harness.going_on(step, lambda: create(jax.random.key(0)), batches)


if __name__ == '__main__':
  # As in experiments/imagenet_resnet50.
  experiments.start(main, {'default': Config()}, static_alpha=True)
