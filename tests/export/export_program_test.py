"""Programs in files compute what the masked network does."""

import functools

import chex
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
    fn, axes = function(make, given), 0 if batch is None else None
    images = draw_images(batch or 2)
    write = functools.partial(
      export_program.write, path, fn, given, images, batch_axes=axes
    )
    if make is make_transformed:
      tolerance = 1e-4
      if batch is None:
        with pytest.raises(ValueError, match='Fix its length with batch_axes'):
          write()
        return
    assert write() == path
    found = export_program.read(path)
    assert found.inputs[0].shape == (batch, *SHAPE)
    assert found.exported.about == {'step': 3}
    for number in (1, 3) if batch is None else (batch,):
      images = draw_images(number)
      logits, expected = (
        np.asarray(x, np.float32)
        for x in (found.run(images), expected_logits(make, given, images))
      )
      np.testing.assert_allclose(logits, expected, tolerance, tolerance)
    if batch is not None:
      with pytest.raises(ValueError, match='input 0 must be float32'):
        found.run(draw_images(batch + 1))

  @pytest.mark.parametrize(
    ('name', 'axes'), [('lenet_300_100', None), ('lenet_5', 0)]
  )
  def test_all_forms_compute_the_same(self, tmp_path, name, axes):
    make = make_lenet(name)
    given = trained(make, 0.9)
    path = export_program.write(
      tmp_path / 'net.npz',
      function(make, given),
      given,
      draw_images(3),
      batch_axes=axes,
      execution='condensed',
      platforms=('cpu',),
    )
    found = export_program.read(path)
    assert list(found.forms) == ['dense', 'masked', 'condensed']
    assert not found.missing
    args = found.arguments(3)
    wanted = expected_logits(make, given, *args)
    for form in found.forms.values():
      logits = form.run(form.parameters, *args)
      np.testing.assert_allclose(logits, wanted, 1e-5, 1e-5)
    kept = sum(int(m.sum()) for m in jax.tree.leaves(given.masks))
    values = jax.tree.leaves(found.forms['condensed'].parameters)
    assert sum(x.size for x in values) == kept

  def test_jax_alone_runs_the_file(self, tmp_path):
    make = make_lenet()
    given = trained(make, 0.95)
    images = draw_images(4)
    path = export_program.write(
      tmp_path / 'net.npz', function(make, given), given, images
    )
    with np.load(path) as file:
      theta = {n[6:]: file[n] for n in file if n.startswith('theta/')}
      program = jax_export.deserialize(bytearray(file['program']))
    assert set(program.platforms) == {'cpu', 'cuda', 'tpu'}
    found = program.call(theta, images)
    expected = expected_logits(make, given, images)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

  def test_weights_and_masks_come_back_from_the_file(self, tmp_path):
    given = trained(make_lenet(), 0.95)
    given.theta['lenet_300_100/logits']['w'] *= 0  # Connections of weight 0.
    path = export_program.write(
      tmp_path / 'net.npz', function(make_lenet(), given), given, draw_images(1)
    )
    with np.load(path) as file:
      held = {n for n in file if n.startswith('masks/')}
    assert held == {'masks/lenet_300_100/logits/w'}
    for found in (export.read(path), export_program.read(path).exported):
      chex.assert_trees_all_equal(found[:2], (given.theta, given.masks))
      assert found.about == {'step': 3}

  def test_at_most_8_percent_of_the_parameters_at_95_percent(self, tmp_path):
    make, shape = make_lenet(), (28, 28, 1)
    given = trained(make, 0.95, shape)
    for axes in (0, None):
      path = export_program.write(
        tmp_path / f'{axes}.npz',
        function(make, given),
        given,
        draw_images(1, shape),
        batch_axes=axes,
      )
      assert path.stat().st_size <= 0.08 * 4 * 266_610

  def test_mistakes_with_files_are_named(self, tmp_path):
    make = make_lenet()
    given = trained(make, 0.95)
    path = tmp_path / 'net.npz'
    write = lambda path: export_program.write(
      path, function(make, given), given, draw_images(1)
    )
    with pytest.raises(ValueError, match=r'none/net\.npz'):
      write(tmp_path / 'none' / 'net.npz')
    write(path)
    data = path.read_bytes()
    with pytest.raises(ValueError, match=r'net\.npz exists'):
      write(path)
    assert path.read_bytes() == data
    for part in (data[:100], data[:-50], b'', b'text'):
      path.write_bytes(part)
      with pytest.raises(ValueError, match=r'cannot read .*net\.npz'):
        export_program.read(path)
    export.write(path, given, format='npz', overwrite=True)
    with pytest.raises(
      ValueError, match=r'program: it holds weights, and no f'
    ):
      export_program.read(path)

  def test_files_of_other_versions_are_refused(self, tmp_path):
    path = export_program.write(
      tmp_path / 'net.npz', lambda theta, x: x @ theta['w'], small(), ones(3, 4)
    )
    with np.load(path) as file:
      arrays = dict(file)
    arrays['program/about'] = str(arrays['program/about']).replace('n 2', 'n 3')
    np.savez(path, **arrays)
    with pytest.raises(
      ValueError, match=r'program, version 3.*reads.*version 2'
    ):
      export_program.read(path)
    # Before there were versions, weights were constants of the program.
    np.savez(path, program=arrays['program'], about=arrays['about'])
    for reader in (export, export_program):
      with pytest.raises(ValueError, match=r'of an earlier version'):
        reader.read(path)


def ones(*shape):
  return jnp.ones(shape)


def small():
  """Weights [4, 2] of which half exist."""
  w = jnp.arange(8.0).reshape(4, 2)
  return Exported({'w': w * (w % 2)}, {'w': w % 2 == 1}, {}, {})


class AnyFunctionTest:
  """Functions and arguments that are not those of a classifier of images."""

  def write(self, tmp_path, fn, *args, **settings):
    return export_program.read(
      export_program.write(
        tmp_path / 'f.npz', fn, small(), *args, overwrite=True, **settings
      )
    )

  def test_arguments_and_results_may_be_trees(self, tmp_path):
    def fn(theta, tokens, more):
      y = theta['w'][tokens] * more['mask'][:, None] + more['shift'][None]
      return {'y': y, 'parts': [y.sum(), (y,)]}

    tokens = np.array([3, 1, 2])
    more = {'mask': np.array([True, True, False]), 'shift': ones(2)}
    with pytest.raises(ValueError, match=r'lengths: 3 in .* 2 in arg'):
      self.write(tmp_path, fn, tokens, more)
    with pytest.raises(ValueError, match='1 entries for 2 arguments'):
      self.write(tmp_path, fn, tokens, more, batch_axes=(0,))
    with pytest.raises(
      ValueError, match='cannot be exported for a batch of an'
    ):
      self.write(tmp_path, fn, tokens, more, batch_axes=(0, None))
    found = self.write(tmp_path, fn, tokens, more, batch_axes=None)
    assert list(map(str, found.inputs)) == ['int32[3]', 'bool[3]', 'float32[2]']
    assert found.inputs[0].range == (1, 3)
    chex.assert_trees_all_close(
      found.run(tokens, more), fn(small().theta, tokens, more)
    )
    drawn, _ = found.arguments()
    assert set(drawn) <= {1, 2, 3}

  def test_other_axes_may_be_the_batch(self, tmp_path):
    fn = lambda theta, x, scale: x.T @ theta['w'] * scale
    args = ones(4, 5), np.float32(2)
    with pytest.raises(
      ValueError, match=r'argument 1 has shape \(\), and so no'
    ):
      self.write(tmp_path, fn, *args, batch_axes=-1)
    found = self.write(tmp_path, fn, *args, batch_axes=(1, None))
    assert list(map(str, found.inputs)) == ['float32[4, batch]', 'float32[]']
    wanted = fn(small().theta, ones(4, 3), 0.5)
    np.testing.assert_allclose(found.run(ones(4, 3), np.float32(0.5)), wanted)

  def test_what_cannot_be_seen_through_is_run_dense(self, tmp_path):
    def fn(theta, x):
      return jax.lax.while_loop(
        lambda y: y.sum() < 100, lambda y: y @ theta['w'] @ ones(2, 4) + 1, x
      )

    found = self.write(tmp_path, fn, ones(3, 4))
    assert list(found.forms) == ['dense', 'masked']
    assert 'inside a while loop' in found.missing
    x = ones(2, 4)
    np.testing.assert_allclose(found.run(x), fn(small().theta, x))

  @pytest.mark.parametrize(
    ('fn', 'message'),
    [
      (lambda theta, x: x @ jnp.ones((4, 2)), "does not use 'w'"),
      (lambda theta, x: x @ theta['w'].T, r'fails with .* float32\[3, 4\]: '),
      (lambda theta, x: x @ theta['v'], r"float32\[3, 4\]: 'v'"),
      (
        lambda theta, x: x.reshape(len(x), -1) @ theta['w'],
        'batch of any length: .* Fix its length with batch_axes=None',
      ),
      (
        lambda theta, x: small()._replace(theta=x @ theta['w']),
        'results of an exported function must be arrays, in dict',
      ),
    ],
    ids=['closes over', 'shapes', 'names', 'length', 'containers'],
  )
  def test_functions_that_cannot_be_written(self, tmp_path, fn, message):
    with pytest.raises(ValueError, match=message):
      self.write(tmp_path, fn, ones(3, 4))
    assert not list(tmp_path.iterdir())

  def test_calls_with_other_arguments_are_refused(self, tmp_path):
    found = self.write(tmp_path, lambda theta, x: x @ theta['w'], ones(3, 4))
    for args, message in (
      ([ones(3, 5)], r'must be float32\[batch, 4\], got float32\[3, 5\]'),
      ([np.ones((3, 4), np.int32)], r'got int32\[3, 4\]'),
      ([ones(3, 4)] * 2, 'takes arguments of structure'),
    ):
      with pytest.raises(ValueError, match=message):
        found.run(*args)

  def test_integers_are_drawn_only_from_a_known_range(self, tmp_path):
    shape = jax.ShapeDtypeStruct((3,), jnp.int32)
    found = self.write(tmp_path, lambda theta, i: theta['w'][i], shape)
    with pytest.raises(ValueError, match=r'its input int32\[batch\] lie'):
      found.arguments()


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
    assert jax.tree.map(np.size, form.parameters) == jax.tree.map(
      lambda mask: int(count(mask)), given.masks
    )
