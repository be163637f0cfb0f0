"""Short runs on streams of batches, for tests; as a program, one of them."""

import dataclasses
import functools
import os
import pathlib
import resource
import signal
import sys
import time

import chex
import haiku as hk
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from powerprop_jax.nets import layers
from powerprop_jax.optim import aliases, powerprop
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.images import batches as image_batches
from powerprop_jax.train.images.stream import DeviceStream, Stream
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs import metrics
from powerprop_jax.train.runs.folder import RunFolder
from powerprop_jax.train.scale import distributed, guard, sharding, stream_loop
from powerprop_jax.train.scale.distributed import HostsConfig
from powerprop_jax.train.scale.stream_loop import StreamLoopConfig

# Compiled with little optimisation, which takes half the time.
OPTIONS = {'xla_backend_optimization_level': 0}
SIZE, BATCH, CLASSES = 8, 16, 5
# Bytes; less than a checkpoint has, more than the metrics have.
FULL_DISK = 30_000


@dataclasses.dataclass(frozen=True)
class Config:
  """A run of a small network with random growth around powerprop."""

  loop: StreamLoopConfig = StreamLoopConfig(
    num_steps=24, log_every=4, eval_every=8, save_every=6, max_skipped=3
  )
  # Steps whose loss is not finite.
  bad: tuple[int, ...] = ()
  # Devices that share a batch, with the state sharded; 0 is a single one.
  devices: int = 0
  # From which evaluation on, to which, there is no room for a checkpoint.
  full_from: int = 1_000_000
  full_to: int = 1_000_000
  # Processes that make the batches.
  num_workers: int = 0
  # Seconds that a step takes longer than it needs.
  delay: float = 0.0
  # After which step the last host gets a signal to stop.
  signal_at: int = 0
  hosts: HostsConfig = HostsConfig()
  out: str = ''
  resume: bool = False


def fill(bad, host, batch_size, number, batch):
  """Images of the classes' colours, below 255 but in the bad batches."""
  generator = np.random.default_rng((number, 7))
  whole = generator.integers(0, 100, (BATCH, SIZE, SIZE, 3), np.uint8)
  labels = generator.integers(0, CLASSES, BATCH, np.int32)
  whole[..., 0] += 30 * labels[:, None, None].astype(np.uint8)
  rows = slice(host * batch_size, (host + 1) * batch_size)
  batch.images[:], batch.labels[:] = whole[rows], labels[rows]
  if number + 1 in bad:
    batch.images[:] = 255
  return []


def make_batches(bad=(), host=0, count=1, num_batches=image_batches.ENDLESS):
  size = BATCH // count
  return image_batches.Batches(
    functools.partial(fill, bad, host, size),
    num_batches,
    image_batches.Share(size, SIZE, host, count),
    {'data': 'colours'},
  )


def forward(images, is_training):
  x = layers.conv(16, 3, 'conv', stride=2, with_bias=False)(images)
  x = jax.nn.relu(layers.norm('norm')(x, is_training))
  x = jax.nn.relu(layers.linear(32, 'hidden')(x.reshape(len(x), -1)))
  return layers.linear(CLASSES, 'logits')(x)


def prepare(images):
  """Not finite where the largest pixel is 255."""
  images = images.astype(jnp.float32)
  return images / (255 - jnp.max(images)) - 0.5


def make_net():
  net = hk.transform_with_state(forward)
  inner = powerprop.powerprop(optax.sgd(0.02, 0.9), 2.0)
  return net, aliases.sparse_evolution(inner, 0.5, stop=1000, period=5)


def create():
  images = jnp.zeros((1, SIZE, SIZE, 3))
  state = step_lib.create(*make_net(), jax.random.key(0), images)
  return guard.create(state)


def make_state():
  return jax.jit(create, compiler_options=OPTIONS)()


@functools.cache
def compiled(devices):
  """Mesh, shapes, where the state lies, and the step."""
  step = guard.guarded(step_lib.make_step(*make_net(), prepare=prepare))
  shapes = jax.eval_shape(create)
  if not devices:
    step = jax.jit(step, donate_argnums=0, compiler_options=OPTIONS)
    return None, shapes, None, step
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  lies = sharding.state_shardings(shapes, mesh, min_size=16)
  step = sharding.on_mesh(step, lies, mesh)
  return mesh, shapes, lies, step


def evaluate(state):
  return {'validation_step': int(state.train.step)}


def run(
  config, folder, *, step=None, batches=None, evaluate=evaluate, writers=()
):
  """Trains in a folder to the end, and gives the last state."""
  mesh, shapes, lies, compiled_step = compiled(config.devices)
  if batches is None:
    host, count = jax.process_index(), jax.process_count()
    batches = make_batches(config.bad, host, count)
  where = None if mesh is None else sharding.batch_sharding(mesh)
  if mesh is None:
    state = make_state()
  else:
    state = sharding.create_sharded(create, mesh, min_size=16)
  return stream_loop.fit(
    state,
    step=step or compiled_step,
    stream=DeviceStream(Stream(batches, num_workers=config.num_workers), where),
    evaluate=evaluate,
    config=config.loop,
    folder=folder,
    template=None if lies is None else sharding.template(shapes, lies),
    description='',
    writers=writers,
  )


def overflowing(at):
  """The step, of which that number leaves weights that are not finite.

  As an update does that overflows although its gradient is finite.
  """
  *_, compiled_step = compiled(0)

  def step(state, images, labels):
    state, found = compiled_step(state, images, labels)
    number = int(state.train.step) + int(state.num_skipped)
    if number != at:
      return state, found
    phi = jax.tree.map(lambda p: jnp.inf * jnp.ones_like(p), state.train.phi)
    state = state._replace(
      train=state.train._replace(phi=phi), num_in_a_row=state.num_in_a_row + 1
    )
    # A copy, as the state is donated.
    return state, {**found, 'num_in_a_row': state.num_in_a_row.copy()}

  return step


def to_host(state):
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda x: np.asarray(jax.random.key_data(x) if is_key(x) else x), state
  )


def assert_same(state, expected):
  """Bit by bit; dtypes, shapes and structure too."""
  chex.assert_trees_all_equal(to_host(state), to_host(expected), strict=True)


def assert_near(state, expected):
  """As far as rounding allows; the masks bit by bit."""
  state, expected = to_host(state), to_host(expected)
  chex.assert_trees_all_equal(state.opt_state.masks, expected.opt_state.masks)
  chex.assert_trees_all_close(
    (state.phi, state.net_state),
    (expected.phi, expected.net_state),
    rtol=1e-4,
    atol=1e-5,
  )


def assert_lies(state, shardings):
  """Each leaf where it should be."""
  jax.tree.map(
    lambda x, s: np.testing.assert_(x.sharding.is_equivalent_to(s, x.ndim)),
    state,
    shardings,
  )


def lines(folder):
  """What metrics.jsonl says, without what depends on the clock."""
  found = metrics.read_metrics(pathlib.Path(folder, 'metrics.jsonl'))
  for record in found:
    record.pop('images_per_second', None)
  return found


def losses(folder):
  """The means that were logged, by step."""
  return {x['step']: x['loss'] for x in lines(folder) if 'loss' in x}


def steps_of(folder):
  return checkpoint.Checkpoints(folder / 'checkpoints').steps()


def open_run(config, resume=False):
  settings = dataclasses.replace(config, hosts=HostsConfig())
  return RunFolder(config.out, settings, program='test', resume=resume)


def main(config):
  """The run, slower if that is wanted; says on the output how far it is."""
  distributed.initialise(config.hosts)
  *_, compiled_step = compiled(config.devices)
  done = 0

  def step(state, images, labels):
    nonlocal done
    time.sleep(config.delay)
    found = compiled_step(state, images, labels)
    state = found[0]
    done = done + 1 if done else int(state.train.step) + int(state.num_skipped)
    print(done, flush=True)
    is_last = jax.process_index() == jax.process_count() - 1
    if done == config.signal_at and is_last:
      os.kill(os.getpid(), signal.SIGUSR1)
    return found

  def evaluate_and_fill(state):
    step = int(state.train.step)
    while step == config.full_from and not steps_of(folder.path):
      time.sleep(0.01)  # until the save in the background is complete
    is_full = config.full_from <= step < config.full_to
    limit = FULL_DISK if is_full else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return evaluate(state)

  # The first host makes it, all others find it.
  if jax.process_index():
    multihost_utils.sync_global_devices('folder')
  folder = open_run(config, resume=config.resume or jax.process_index())
  if not jax.process_index():
    multihost_utils.sync_global_devices('folder')
  run(config, folder, step=step, evaluate=evaluate_and_fill)


if __name__ == '__main__':
  sys.exit(run_folder.run_main(lambda: main(tyro.cli(Config))))
