"""Programs in files compute what the masked network does."""

import functools

import haiku as hk
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np
import pytest

from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.export import export, inference
from powerprop_jax.export import program as export_program
from powerprop_jax.export.exported import Exported
from powerprop_jax.nets import layers
from powerprop_jax.prune import one_shot

SHAPE = (16, 16, 1)


def make_lenet(name='lenet_300_100'):
  return functools.partial(nets.make, name, 10)


def make_normalised():
  """A small network with a convolution and a norm."""

  def forward(images, is_training):
    x = layers.conv(6, 3, 'conv', stride=4)(images)
    x = jax.nn.relu(layers.norm('norm')(x, is_training))
    return layers.linear(10, 'logits')(layers.flatten(x))

  return hk.transform_with_state(forward)


def trained(make, sparsity, shape=SHAPE, change_masks=lambda masks: None):
  """A network with random masks and biases, and statistics of its norms."""
  net = make()
  images = jax.random.uniform(jax.random.key(1), (8, *shape))
  theta, net_state = net.init(jax.random.key(0), images, True)
  _, net_state = net.apply(theta, net_state, jax.random.key(2), images, True)
  masks = one_shot.prune(theta, sparsity)
  masks = {m: dict(leaves) for m, leaves in masks.items()}
  change_masks(masks)
  theta = jax.tree.map(lambda x: x + 0.01, theta)
  return Exported(
    masks_lib.apply_masks(theta, masks), masks, net_state, {'step': 3}
  )


def function(make, exported):
  """The logits of a network, of (theta, images)."""
  net = make()
  return lambda theta, images: net.apply(
    theta, exported.net_state, None, images, False
  )[0]


def expected_logits(make, exported, images):
  theta = masks_lib.apply_masks(exported.theta, exported.masks)
  return function(make, exported)(theta, images)


def draw_images(batch, shape=SHAPE):
  return np.random.default_rng(0).random((batch, *shape), np.float32)


def empty_some(masks):
  """Without the connections of one input, one output and a whole layer."""
  name = 'lenet_300_100'
  first = masks[f'{name}/linear_0']
  first['w'] = first['w'].at[3].set(False).at[:, 5].set(False)
  masks[f'{name}/logits']['w'] &= False


make_transformed = functools.partial(
  nets.make, 'mlp', 10, dct=True, w_init=hk.initializers.RandomNormal()
)


def in_half(dtype):
  """Changes a network to half precision."""

  def change(given):
    theta = jax.tree.map(lambda x: x.astype(dtype), given.theta)
    return given._replace(theta=theta)

  return change


class ProgramTest:
  @pytest.mark.parametrize('batch', [None, 1, 5])
  @pytest.mark.parametrize(
    ('make', 'sparsity', 'settings'),
    [
      (make_lenet(), 0.0, {}),
      (make_lenet(), 0.4, {}),
      (make_lenet(), 0.95, {}),
      (make_lenet(), 0.9, dict(change_masks=empty_some)),
      (make_lenet(), 0.9, dict(change=in_half(jnp.bfloat16))),
      (make_lenet(), 0.9, dict(change=in_half(jnp.float16))),
      (make_lenet('lenet_5'), 0.95, {}),
      (make_normalised, 0.9, {}),
      (make_transformed, 0.9, {}),
    ],
    ids=[
      *('full', 'dense', 'sparse', 'empty parts', 'bfloat16', 'float16'),
      *('convolutions', 'norms', 'transforms'),
    ],
  )
  @pytest.mark.slow
  def test_gives_the_logits_of_the_masked_network(
    self, tmp_path, make, sparsity, settings, batch
  ):
    settings = dict(settings)
    change = settings.pop('change', None)
    given = trained(make, sparsity, **settings)
    tolerance = 1e-5
    if change is not None:
      given, tolerance = change(given), 0.03
    path = tmp_path / 'net.npz'
    write = functools.partial(
      export_program.write, path, function(make, given), given, SHAPE
    )
    if make is make_transformed:
      tolerance = 1e-4
      if batch is None:
        with pytest.raises(ValueError, match='Say how many there are, with ba'):
          write()
        return
    assert write(batch=batch) == path
    found = export_program.read(path)
    assert found[1:] == (SHAPE, batch, {'step': 3})
    for number in (1, 3) if batch is None else (batch,):
      images = draw_images(number)
      logits, expected = (
        np.asarray(x, np.float32)
        for x in (found.run(images), expected_logits(make, given, images))
      )
      np.testing.assert_allclose(logits, expected, tolerance, tolerance)
    if batch is not None:
      with pytest.raises(ValueError):
        found.run(draw_images(batch + 1))

  def test_jax_alone_runs_the_file(self, tmp_path):
    make = make_lenet()
    given = trained(make, 0.95)
    path = export_program.write(
      tmp_path / 'net.npz', function(make, given), given, SHAPE
    )
    with np.load(path) as arrays:
      program = jax_export.deserialize(bytearray(arrays['program']))
    assert set(program.platforms) == {'cpu', 'cuda', 'tpu'}
    images = draw_images(4)
    expected = expected_logits(make, given, images)
    found = program.call(images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

  def test_at_most_8_percent_of_the_parameters_at_95_percent(self, tmp_path):
    make, shape = make_lenet(), (28, 28, 1)
    given = trained(make, 0.95, shape)
    fn = function(make, given)
    for batch in (None, 1):
      path = export_program.write(
        tmp_path / f'{batch}.npz', fn, given, shape, batch=batch
      )
      assert path.stat().st_size <= 0.08 * 4 * 266_610

  def test_mistakes_are_named(self, tmp_path):
    make = make_lenet()
    given = trained(make, 0.95)
    fn = function(make, given)
    path = tmp_path / 'net.npz'
    with pytest.raises(ValueError, match='batch must be at least 1, got 0'):
      export_program.write(path, fn, given, SHAPE, batch=0)
    with pytest.raises(ValueError, match=r'none/net\.npz'):
      export_program.write(tmp_path / 'none' / 'net.npz', fn, given, SHAPE)
    assert not path.exists()
    export_program.write(path, fn, given, SHAPE)
    data = path.read_bytes()
    with pytest.raises(ValueError, match=r'net\.npz exists'):
      export_program.write(path, fn, given, SHAPE)
    assert path.read_bytes() == data
    with pytest.raises(ValueError, match="'program', which no exported netw"):
      export.read(path)
    for part in (data[:100], data[:-50], b'', b'text'):
      path.write_bytes(part)
      with pytest.raises(ValueError, match=r'cannot read .*net\.npz'):
        export_program.read(path)
    export.write(path, given, format='npz', overwrite=True)
    with pytest.raises(ValueError, match=r"net\.npz as a program: 'program"):
      export_program.read(path)


class FormsTest:
  @pytest.mark.parametrize('sparsity', [0.0, 0.9])
  def test_all_compute_the_same(self, sparsity):
    make = make_lenet('lenet_5')
    given = trained(make, sparsity)
    images = draw_images(3)
    wanted = expected_logits(make, given, images)
    fn = function(make, given)
    for form in (
      inference.dense(fn, given),
      inference.masked(fn, given),
      inference.condensed(fn, given, images),
    ):
      found = jax.jit(form.run)(form.parameters, images)
      np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)

  @pytest.mark.parametrize('sparsity', [0.95, 0.4])
  def test_condensed_form_holds_connections_if_fewer_than_zeros(self, sparsity):
    make = make_lenet()
    given = trained(make, sparsity)
    fn = function(make, given)
    form = inference.condensed(fn, given, draw_images(1))
    count = np.sum if sparsity > 0.5 else np.size
    assert not form.missing
    assert jax.tree.map(np.size, form.parameters) == jax.tree.map(
      lambda mask: int(count(mask)), given.masks
    )
