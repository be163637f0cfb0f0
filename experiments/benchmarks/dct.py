r"""What the fixed cosine transform costs in the step of a sparse layer.

    python -m experiments.benchmarks.dct
    python -m experiments.benchmarks.dct --kinds conv --repeats 5

A step is forward, backward (weights and inputs) and an SGD update of one layer,
in a jitted function whose state is donated. The sparse layer has two forms:

masked     a dense weight and fixed masks, trained inside static.
condensed  the connections only, by pp.without_zeros; a transform that is a
           matrix is added to the weight, which is then dense.

Each form is measured without transform and with the transform applied as a
matrix, as a fast Fourier transform, and as 'auto' chooses. `ratio` is to the
same form without transform, `to masked` to the masked layer without transform:
where few connections make the condensed product faster than the transform, only
the second says whether the layer is slow. All steps of a table take turns in
one process. The masked layer without transform runs twice, so that the last row
shows how far a ratio can be trusted. The default takes about a quarter of an
hour on two CPU cores.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import statistics
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

import experiments
from experiments.benchmarks import harness
import powerprop_jax as pp
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.files import tables
from powerprop_jax.nets import layers
from powerprop_jax.nets.layers import forms
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError

Kind = Literal['linear', 'conv']
Form = Literal['masked', 'condensed']

FORMS: tuple[Form, ...] = ('masked', 'condensed')
METHODS = ('none', 'matrix', 'fft', 'auto')


class _Conv(NamedTuple):
  """A convolution of square images."""

  image_size: int
  num_in: int
  num_out: int
  kernel_size: int


_CONVS = {
  'first': _Conv(32, 3, 64, 3),
  'early': _Conv(32, 64, 64, 3),
  'late': _Conv(4, 512, 512, 3),
  'last': _Conv(1, 512, 512, 3),
  'shortcut': _Conv(4, 1024, 2048, 1),
}

# A layer in training: (φ, state of the optimiser).
Carry = tuple[Any, Any]
Step = Callable[[Carry, jax.Array], tuple[Carry, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Config:
  """Time of the step of a sparse layer, with and without cosine transform."""

  # Kinds of layers: linear, conv.
  kinds: tuple[Kind, ...] = ('linear', 'conv')
  # Inputs and outputs of linear layers.
  widths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
  # Examples in a batch of a linear layer.
  batches: tuple[int, ...] = (1, 16, 128, 512)
  # Convolutions: first, early, late, last, shortcut.
  convs: tuple[str, ...] = tuple(_CONVS)
  # Examples in a batch of a convolution.
  conv_batch: int = 64
  # Shares of the weights that exist.
  densities: tuple[float, ...] = (0.01, 0.001)
  # Steps in a timed run.
  steps: int = 5
  # Timed runs of each program.
  repeats: int = 11


def main(config: Config) -> None:
  """Prints a table for each layer, batch size and density."""
  _check(config)
  print(timing.environment())
  for density in config.densities:
    for layer in _layers(config):
      _measure(config, layer, density)


def _check(config: Config) -> None:
  harness.check_known(config, 'convs', _CONVS)
  for density in config.densities:
    if not 0 < density <= 1:
      raise UserError(f'--densities must be in (0, 1], got {density}.')
  errors.check_positive(config, 'widths', 'batches', 'conv_batch')
  errors.check_positive(config, 'steps', 'repeats')


class _Layer(NamedTuple):
  """What is measured, with the shapes of its weight and of its inputs."""

  title: str
  shape: tuple[int, ...]
  inputs_shape: tuple[int, ...]


def _layers(config: Config) -> list[_Layer]:
  found = []
  if 'linear' in config.kinds:
    for width in config.widths:
      for batch in config.batches:
        title = f'linear {width} → {width}, batch {batch}'
        found.append(_Layer(title, (width, width), (batch, width)))
  if 'conv' in config.kinds:
    batch = config.conv_batch
    for name in config.convs:
      size, num_in, num_out, kernel = _CONVS[name]
      title = (
        f'conv {kernel}×{kernel}, {num_in} → {num_out}, batch {batch} of '
        f'{size}×{size}'
      )
      shape = (kernel, kernel, num_in, num_out)
      found.append(_Layer(title, shape, (batch, size, size, num_in)))
  return found


def _measure(config: Config, layer: _Layer, density: float) -> None:
  """Measures the forms of one layer and prints their table."""
  mask = _random_mask(layer.shape, density)
  inputs = jax.random.normal(jax.random.key(0), layer.inputs_shape)
  keys = [(form, method) for form in FORMS for method in METHODS]
  names = {f'{form}, {method}': (form, method) for form, method in keys}
  names['masked, none, again'] = ('masked', 'none')
  programs = {}
  for name, key in names.items():
    step, carry = make_step(*key, mask, inputs)
    programs[name] = harness.going_on(
      jax.jit(step, donate_argnums=0),
      functools.partial(lambda first: first, carry),
      [(inputs,)] * config.steps,
    )
  times = timing.take_turns(programs, config.repeats)
  print(
    f'\n{layer.title}, density {density:g}; medians of {config.repeats} '
    f'interleaved runs of {config.steps} steps.\n'
  )
  rows = []
  for name, (form, _) in names.items():
    wall = times[name].wall
    ms = 1e3 * statistics.median(wall) / config.steps
    ratio, to_masked = (
      round(timing.median_ratio(wall, times[f'{base}, none'].wall), 3)
      for base in (form, 'masked')
    )
    rows.append(
      {
        'form, transform': name,
        'ms': round(ms, 3),
        'ratio': ratio,
        'to masked': to_masked,
      }
    )
  print(tables.text_table(rows), flush=True)


def _random_mask(
  shape: tuple[int, ...], density: float
) -> np.ndarray[Any, Any]:
  size = math.prod(shape)
  kept = masks_lib.num_kept(size, 1 - density)
  mask = np.zeros(size, bool)
  mask[np.random.default_rng(0).choice(size, kept, replace=False)] = True
  return mask.reshape(shape)


def make_step(
  form: Form, method: str, mask: np.ndarray[Any, Any], inputs: jax.Array
) -> tuple[Step, Carry]:
  """The training step of one sparse layer, and its first carry.

  step(carry, inputs) gives the carry after it and the gradient of the inputs;
  the method 'none' leaves out the transform.
  """
  net: hk.Transformed = hk.without_apply_rng(
    hk.transform(lambda x: _module(method, mask.shape)(x))
  )
  theta = jax.jit(net.init)(jax.random.key(0), inputs)
  masks = masks_lib.full_masks(theta)
  masks['layer']['w'] = jnp.asarray(mask)
  tx: optax.GradientTransformation = optax.sgd(0.01)
  run: Callable[..., jax.Array] = net.apply
  if form == 'masked':
    tx = pp.static(tx, masks=masks)
  else:
    run = pp.without_zeros(run, masks, theta, inputs, execution='condensed')
    theta = pp.condense(theta, masks)

  def step(carry: Carry, inputs: jax.Array) -> tuple[Carry, jax.Array]:
    phi, opt_state = carry

    def loss_fn(theta: hk.Params, inputs: jax.Array) -> jax.Array:
      return 0.5 * jnp.mean(run(theta, inputs) ** 2)

    theta = pp.effective_params(phi, opt_state)
    grads, to_inputs = jax.grad(loss_fn, (0, 1))(theta, inputs)
    updates, opt_state = tx.update(grads, opt_state, phi)
    return (optax.apply_updates(phi, updates), opt_state), to_inputs

  return step, pp.init(tx, theta)


def _module(
  method: str, shape: tuple[int, ...]
) -> Callable[[jax.Array], jax.Array]:
  """The layer; the one without transform is that of our networks."""
  *window, _, num_out = shape
  has_transform = method != 'none'
  chosen: Any = method if has_transform else 'auto'
  form = forms.Form(has_transform, method=chosen)
  with forms.use(form):
    if window:
      return layers.conv(num_out, window[0], 'layer')
    return layers.linear(num_out, 'layer')


if __name__ == '__main__':
  experiments.start(main, {'default': Config()})
