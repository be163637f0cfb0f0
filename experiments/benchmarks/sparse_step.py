r"""What sparse training costs in a step that rewires nothing.

    python -m experiments.benchmarks.sparse_step
    python -m experiments.benchmarks.sparse_step --nets resnet_50 --ways own \
        --batch 16 --image-size 224

The baseline is the dense step as anyone would write it with Haiku and Optax,
SGD with momentum; each method is the same step with a sparsify around the
optimiser. Nothing is rewired: that is what `rewiring` measures. Three ways to
run a step:

own    a jitted step as in the README, one dispatch each, the state donated.
loop   many steps in one jax.lax.scan, the state donated, and θ read with
       pinned=True: what sparsify holds at zero is not masked once more.
lanes  as loop, several networks at once by jax.vmap; for lenet_300_100 only.

All steps of a table take turns in one process, compiled as JAX comes;
--with-flags adds them in a second one with the compiler flags that the programs
of this library set (train/scale/fusing.py), against the same baseline, as
they are and with the update written twice (fusing.fused). The dense
step runs twice, so that the second row shows how far a ratio can be trusted.

The cost depends on the number of weights only, and the dense step on batch and
image size too: with the small batch and images that ResNet-50 has here by
default, the ratio is larger than in real training, and `extra ms` is what to
compare. The default takes about half an hour on two CPU cores.
"""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import statistics
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

import experiments
from experiments.benchmarks import harness
import powerprop_jax as pp
from powerprop_jax import nets
from powerprop_jax.core import masks
from powerprop_jax.files import tables
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs import errors
from powerprop_jax.train.scale import fusing

Way = Literal['own', 'loop', 'lanes']


class _Setting(NamedTuple):
  """What a network is measured with."""

  batch: int
  image_size: int
  num_channels: int
  num_classes: int
  num_steps: int  # in a timed run


_SETTINGS = {
  'lenet_300_100': _Setting(100, 28, 1, 10, 100),
  'cifar_cnn': _Setting(64, 32, 3, 10, 10),
  'resnet_50': _Setting(8, 128, 3, 1000, 2),
}

# A step that no run gets to.
_NEVER = 10**9

METHODS: dict[
  str,
  Callable[[optax.GradientTransformation, float], optax.GradientTransformation],
] = {
  'static': pp.static,
  'gradual': functools.partial(
    pp.gradual_pruning, start=0, stop=2 * _NEVER, period=_NEVER
  ),
  'set': functools.partial(pp.sparse_evolution, stop=2 * _NEVER, period=_NEVER),
  'rigl': functools.partial(pp.rigl, stop=2 * _NEVER, period=_NEVER),
  'rigl_alpha_2': lambda inner, sparsity: pp.rigl(
    pp.powerprop(inner, 2.0), sparsity, stop=2 * _NEVER, period=_NEVER
  ),
  'snfs': functools.partial(pp.snfs, stop=2 * _NEVER, period=_NEVER),
  'dsr': functools.partial(pp.dsr, stop=2 * _NEVER, period=_NEVER),
  # Chooses once, at the first step, which is not timed.
  'top_kast': lambda inner, sparsity: pp.top_kast(
    inner, sparsity, max(sparsity - 0.1, 0), period=_NEVER
  ),
}

# The programs of a process that measures; see _prepare.
_PROGRAMS: dict[str, timing.Program] = {}

# A network in training: (φ, state of the optimiser, state of the network).
_Carry = tuple[hk.Params, Any, hk.MutableState]
_View = Callable[[hk.Params, Any], hk.Params]
_Step = Callable[[_Carry, jax.Array, jax.Array], _Carry]


@dataclasses.dataclass(frozen=True)
class Config:
  """Time of a step of sparse training that rewires nothing."""

  # Networks: lenet_300_100, cifar_cnn, resnet_50.
  nets: tuple[str, ...] = tuple(_SETTINGS)
  # A jitted step of your own, a loop of steps, a loop of several networks.
  ways: tuple[Way, ...] = ('own', 'loop', 'lanes')
  # Methods to measure beside the dense step.
  methods: tuple[str, ...] = tuple(METHODS)
  # Share of zeros.
  sparsity: float = 0.9
  # Examples in a batch. Default: 100, 64 and 8 for the three networks.
  batch: int | None = None
  # Height and width of images. Default: 28, 32 and 128.
  image_size: int | None = None
  # Steps in a timed run. Default: 100, 10 and 2.
  steps: int | None = None
  # Timed runs of each program.
  repeats: int = 21
  # Networks side by side in 'lanes'.
  lanes: int = 4
  # Also measure with the compiler flags of our programs.
  with_flags: bool = False


def main(config: Config) -> None:
  """Prints a table for each network and way."""
  _check(config)
  print(timing.environment())
  for net_name in config.nets:
    for way in config.ways:
      if way != 'lanes' or net_name == 'lenet_300_100':
        _print(config, net_name, way, _measure(config, net_name, way))


def _check(config: Config) -> None:
  harness.check_known(config, 'nets', _SETTINGS)
  harness.check_known(config, 'methods', METHODS)
  masks.check_sparsity(config.sparsity, '--sparsity')
  errors.check_positive(
    config, 'batch', 'image_size', 'steps', 'repeats', 'lanes'
  )


def _setting(config: Config, net_name: str) -> _Setting:
  usual = _SETTINGS[net_name]
  return usual._replace(
    batch=config.batch or usual.batch,
    image_size=config.image_size or usual.image_size,
    num_steps=config.steps or usual.num_steps,
  )


def _measure(
  config: Config, net_name: str, way: Way
) -> dict[str, tuple[list[float], list[float]]]:
  """(wall, CPU) seconds per step of every program, run by run."""
  num_steps = _setting(config, net_name).num_steps
  found: dict[str, tuple[list[float], list[float]]] = {}
  with contextlib.ExitStack() as stack:
    pools = []
    for flags in ('none', 'static') if config.with_flags else ('none',):
      initargs = (config, net_name, way, flags != 'none')
      context = harness.process_with(flags, _prepare, initargs)
      pools.append(stack.enter_context(context))
    for repeat in range(config.repeats + 1):
      for pool in pools:
        for name, seconds in pool.submit(_take_turn).result().items():
          if repeat:  # the first one compiles
            for kind, value in zip(
              found.setdefault(name, ([], [])), seconds, strict=True
            ):
              kind.append(value / num_steps)
  return found


def _take_turn() -> dict[str, tuple[float, float]]:
  """Runs the programs of this process once."""
  return {name: timing.run_once(run) for name, run in _PROGRAMS.items()}


def _prepare(config: Config, net_name: str, way: Way, with_flags: bool) -> None:
  """Makes the programs of this process."""
  setting = _setting(config, net_name)
  net = nets.make(net_name, setting.num_classes)
  key = jax.random.key(0)
  size, num_examples = setting.image_size, 10 * setting.batch
  images = jax.random.uniform(
    key, (num_examples, size, size, setting.num_channels)
  )
  labels = jax.random.randint(key, (num_examples,), 0, setting.num_classes)
  init = jax.jit(functools.partial(net.init, is_training=True))
  theta, net_state = init(key, images[:1])
  lanes = (config.lanes,) if way == 'lanes' else ()
  rows = jax.random.randint(
    key, (setting.num_steps, *lanes, setting.batch), 0, num_examples
  )

  def program(tx: optax.GradientTransformation, view: _View) -> timing.Program:
    """Goes some steps on with a network of its own."""
    carry = (*pp.init(tx, theta), jax.tree.map(jnp.array, net_state))
    step = make_step(net, tx, view)
    if way == 'lanes':
      step = jax.vmap(step)
      carry = jax.tree.map(lambda x: jnp.stack([x] * config.lanes), carry)

    def once(carry: _Carry, images: Any, labels: Any) -> tuple[_Carry, None]:
      return step(carry, images, labels), None

    def loop(carry: _Carry, *data: jax.Array) -> tuple[_Carry, None]:
      images, labels, rows = data
      take = lambda carry, row: once(carry, images[row], labels[row])
      return jax.lax.scan(take, carry, rows)

    run: Callable[..., tuple[_Carry, None]] = loop
    batches: list[tuple[jax.Array, ...]] = [(images, labels, rows)]
    if way == 'own':
      run, batches = once, [(images[row], labels[row]) for row in rows]
    run = jax.jit(run, donate_argnums=0)
    return harness.going_on(run, lambda: carry, batches)

  inner = optax.sgd(0.01, momentum=0.9)
  if not with_flags:
    for name in ('dense', 'dense, again'):
      _PROGRAMS[name] = program(inner, lambda phi, opt_state: phi)
  view = functools.partial(pp.effective_params, pinned=way != 'own')
  for name in config.methods:
    tx = METHODS[name](inner, config.sparsity)
    if not with_flags:
      _PROGRAMS[name] = program(tx, view)
      continue
    _PROGRAMS[f'{name}, our flags'] = program(tx, view)
    _PROGRAMS[f'{name}, our flags, twice'] = program(fusing.fused(tx), view)


def make_step(
  net: hk.TransformedWithState,
  tx: optax.GradientTransformation,
  view: _View,
) -> _Step:
  """The step of the README, for a network with a state.

  Returns:
    step((φ, state of the optimiser, state of the network), images, labels),
    which gives the three after it.
  """

  def step(carry: _Carry, images: jax.Array, labels: jax.Array) -> _Carry:
    phi, opt_state, net_state = carry

    def loss_fn(theta: hk.Params) -> tuple[jax.Array, hk.MutableState]:
      logits, after = net.apply(theta, net_state, None, images, True)
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return jnp.mean(losses), after

    grads, after = jax.grad(loss_fn, has_aux=True)(view(phi, opt_state))
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state, after

  return step


def _print(
  config: Config,
  net_name: str,
  way: Way,
  found: Mapping[str, tuple[list[float], list[float]]],
) -> None:
  setting = _setting(config, net_name)
  size = setting.image_size
  print(
    f'\n{net_name}, {way}'
    + (f' ({config.lanes} networks)' if way == 'lanes' else '')
    + f', batch {setting.batch} of {size}×{size}×{setting.num_channels}, '
    f'sparsity {config.sparsity:g}; medians of {config.repeats} interleaved '
    f'runs of {setting.num_steps} steps.\n'
  )
  dense_wall, dense_cpu = found['dense']
  rows = []
  for name, (wall, cpu) in found.items():
    extra = [a - b for a, b in zip(wall, dense_wall, strict=True)]
    rows.append(
      {
        'step': name,
        'ms': round(1e3 * statistics.median(wall), 3),
        'extra_ms': round(1e3 * statistics.median(extra), 3),
        'ratio': round(timing.median_ratio(wall, dense_wall), 3),
        'CPU_ratio': round(timing.median_ratio(cpu, dense_cpu), 3),
      }
    )
  print(tables.text_table(rows), flush=True)


if __name__ == '__main__':
  experiments.start(main, {'default': Config()})
