"""Exported networks: what is written comes back, what is damaged does not."""

import json
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_io

from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.export import export, exported
from powerprop_jax.export.exported import Exported
from powerprop_jax.prune import one_shot

FORMATS = export.FORMATS


def network(dtype=np.float32, density=0.2):
  """A network with every shape of leaf and every kind of mask."""
  rng = np.random.default_rng(0)
  shapes = {
    'linear_0/w': (7, 5), 'linear_0/b': (5,), 'conv/w': (3, 3, 2, 4),
    'conv/b': (4,), 'full/w': (4, 3), 'none/w': (3, 4), 'one/w': (1, 1),
    'scalar/transform_scale': (), 'row/w': (1, 9), 'column/w': (9, 1),
  }  # fmt: skip
  theta, masks = {}, {}
  for path, shape in shapes.items():
    module, _, name = f'net/{path}'.rpartition('/')
    share = {'full/w': 1, 'none/w': 0}.get(path, density)
    mask = np.asarray(rng.random(shape) < (share if name == 'w' else 1))
    value = rng.standard_normal(shape).astype(dtype)
    theta.setdefault(module, {})[name] = np.where(mask, value, dtype(0))
    masks.setdefault(module, {})[name] = mask
  # Weights that exist and are zero, of either sign.
  theta['net/full']['w'][0, :2] = (0.0, -0.0)
  net_state = {'net/norm/~/mean_ema': {'average': np.arange(3.0, dtype=dtype)}}
  return Exported(theta, masks, net_state, {'step': 8, 'nested': {'a': [1.5]}})


def assert_same(found, expected):
  """Structure, shapes, dtypes and every bit; and the description."""
  assert found.about == expected.about
  for a, b in zip(found[:3], expected[:3], strict=True):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
      assert x.tobytes() == np.asarray(y).tobytes()


def pruned_lenet(sparsity):
  net = nets.make('lenet_300_100', 10)
  theta, _ = net.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), True)
  masks = one_shot.prune(theta, sparsity)
  return Exported(masks_lib.apply_masks(theta, masks), masks, {}, {})


def rewrite(path, change):
  """Changes the tensors and metadata of a safetensors file, checksum aside."""
  data = path.read_bytes()
  size = int.from_bytes(data[:8], 'little')
  metadata = json.loads(data[8 : 8 + size])['__metadata__']
  tensors = {k: v.copy() for k, v in safetensors_io.load(data).items()}
  change(tensors, metadata)
  path.write_bytes(safetensors_io.save(tensors, metadata))


@pytest.fixture(params=FORMATS)
def written(request, tmp_path):
  """A network, and the file of each format that holds it."""
  given = network()
  return given, export.write(tmp_path / 'net', given, format=request.param)


class RoundTripTest:
  @pytest.mark.parametrize('format', FORMATS)
  @pytest.mark.parametrize(
    ('dtype', 'density'),
    [
      *((np.float32, 0.0), (np.float32, 0.03), (np.float32, 1.0)),
      *((np.float64, 0.2), (np.float16, 0.5), (jnp.bfloat16, 0.2)),
    ],
  )
  def test_everything_comes_back_to_the_last_bit(
    self, tmp_path, format, dtype, density
  ):
    expected = network(dtype, density)
    path = export.write(tmp_path / 'net', expected, format=format)
    assert_same(export.read(path), expected)

  @pytest.mark.parametrize('format', FORMATS)
  def test_arrays_in_other_orders_of_memory_come_back(self, tmp_path, format):
    w = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    for array in (w.T, w[:, ::2], np.asfortranarray(w)):
      for mask in (np.ones(array.shape, bool), array % 2 == 0):
        trees = {'a': {'w': array}}, {'a': {'w': mask}}, {'n': {'v': array}}
        found = export.read(
          export.write(
            tmp_path / 'n', Exported(*trees, {}), format=format, overwrite=True
          )
        )
        np.testing.assert_array_equal(found.theta['a']['w'], array * mask)
        np.testing.assert_array_equal(found.net_state['n']['v'], array)

  @pytest.mark.parametrize('format', FORMATS)
  def test_removed_weights_are_zero_whatever_they_were(self, tmp_path, format):
    w = np.array([[np.nan, 2.0], [3.0, -0.0]])
    given = Exported({'a': {'w': w}}, {'a': {'w': w == 2.0}}, {}, {})
    found = export.read(export.write(tmp_path / 'n', given, format=format))
    expected = np.array([[0.0, 2.0], [0.0, 0.0]])
    assert found.theta['a']['w'].tobytes() == expected.tobytes()


def size_of(mask, folder):
  theta = {'a': {'w': np.zeros(mask.shape, np.float32)}}
  given = Exported(theta, {'a': {'w': mask}}, {}, {})
  return export.write(folder / 'net', given).stat().st_size


class SizeTest:
  def test_at_most_8_percent_of_the_dense_file_at_95_percent(self, tmp_path):
    given = pruned_lenet(0.95)
    dense = given._replace(masks=masks_lib.full_masks(given.theta))
    whole = export.write(tmp_path / 'dense', dense).stat().st_size
    assert whole >= exported.dense_bytes(given.theta)
    for format in ('safetensors', 'scipy'):
      path = export.write(tmp_path / format, given, format=format)
      assert path.stat().st_size <= 0.08 * whole

  @pytest.mark.parametrize('density', [0.01, 0.02, 0.05, 0.1, 0.5])
  def test_bits_of_random_masks_are_near_the_bound(self, tmp_path, density):
    mask = np.random.default_rng(0).random((1000, 1000)) < density
    bits = 8 * (size_of(mask, tmp_path) - 4 * mask.sum()) / mask.size
    bound = -sum(p * np.log2(p) for p in (density, 1 - density))
    assert bound < bits < bound + 0.06

  def test_masks_of_whole_rows_take_next_to_nothing(self, tmp_path):
    mask = np.zeros((1000, 1000), bool)
    mask[::100] = True
    assert size_of(mask, tmp_path) < 4 * mask.sum() + 3000


class OtherReadersTest:
  def test_safetensors_is_read_without_this_library(self, tmp_path):
    given = pruned_lenet(0.95)
    path = export.write(tmp_path / 'net', given)
    tensors = safetensors_io.load_file(path)
    name = 'lenet_300_100/linear_0'
    np.testing.assert_array_equal(tensors[f'theta/{name}/b'], np.zeros(300))
    bits = np.frombuffer(
      zlib.decompress(tensors[f'masks/{name}/w'].tobytes()), np.uint8
    )
    mask = np.unpackbits(bits, count=784 * 300).reshape(784, 300) > 0
    weight = np.zeros((784, 300), np.float32)
    weight[mask] = tensors[f'values/{name}/w']
    np.testing.assert_array_equal(weight, given.theta[name]['w'])

  def test_npz_is_read_by_numpy(self, tmp_path):
    given = network(jnp.bfloat16)
    path = export.write(tmp_path / 'net.npz', given, format='npz')
    with np.load(path) as arrays:
      w = arrays['theta/net/linear_0/w']
      assert w.dtype == np.float32
      np.testing.assert_array_equal(w, given.theta['net/linear_0']['w'])
      assert json.loads(str(arrays['about'])) == given.about
      assert json.loads(str(arrays['dtypes']))['theta/net/conv/b'] == 'bfloat16'


class DamageTest:
  def test_a_file_that_is_cut_off_is_refused(self, written):
    _, path = written
    data = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
      path.write_bytes(data[: int(share * len(data))])
      with pytest.raises(ValueError, match=r'cannot read .*net as an exported'):
        export.read(path)

  def test_no_changed_byte_gives_another_network(self, written):
    given, path = written
    data = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 150):
      changed = bytearray(data)
      changed[place] ^= 0x15
      path.write_bytes(changed)
      try:
        found = export.read(path)
      except ValueError:
        continue
      assert_same(found, given)  # a byte that means nothing

  def test_files_of_something_else_are_refused(self, tmp_path):
    path = tmp_path / 'net'
    for content in (b'', b'x', b'PK', b'not a network', b'{}' * 40, bytes(100)):
      path.write_bytes(content)
      with pytest.raises(ValueError, match=r'cannot read .*net as an exported'):
        export.read(path)

  def test_networks_of_others_are_refused(self, tmp_path):
    np.savez(tmp_path / 'other.npz', x=np.zeros(2))
    with pytest.raises(ValueError, match=r"other\.npz .* no array 'about"):
      export.read(tmp_path / 'other.npz')
    safetensors_io.save_file({'x': np.zeros(2)}, tmp_path / 'other')
    with pytest.raises(ValueError, match='in format None'):
      export.read(tmp_path / 'other')

    for path in (tmp_path / 'none', tmp_path):
      with pytest.raises(ValueError, match=f'cannot read {path}'):
        export.read(path)


def moved(move):
  """Changes the connections of a layer in a file."""

  def change(tensors, metadata):
    name = 'masks/net/linear_0/w'
    bits = np.frombuffer(zlib.decompress(tensors[name].tobytes()), np.uint8)
    mask = move(np.unpackbits(bits, count=35))
    bits = zlib.compress(np.packbits(mask).tobytes())
    tensors[name] = np.frombuffer(bits, np.uint8)

  return change


def reshaped(tensors, metadata):
  shapes = json.loads(metadata['shapes'])
  metadata['shapes'] = json.dumps({**shapes, 'net/linear_0/w': [70, 5]})


def without(name):
  return lambda tensors, metadata: tensors.pop(name)


class ChangedMaskTest:
  @pytest.mark.parametrize(
    ('change', 'message'),
    [
      (moved(lambda mask: np.arange(35) < 3), r'_0/w has \d+ values, and 3 c'),
      (moved(lambda mask: np.roll(mask, 1)), 'changed after it was written'),
      (reshaped, 'the mask of net/linear_0/w is dam'),
      (without('masks/net/linear_0/w'), 'cannot read'),
      (without('values/net/conv/w'), 'cannot read'),
      (without('theta/net/full/w'), 'cannot read'),
    ],
  )
  def test_other_masks_and_missing_tensors_are_refused(
    self, tmp_path, change, message
  ):
    path = export.write(tmp_path / 'net', network(), format='safetensors')
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
      export.read(path)


class WriteTest:
  def test_replaces_a_file_only_on_request(self, tmp_path):
    given, path = network(), tmp_path / 'net'
    path.write_text('mine')
    with pytest.raises(ValueError, match=r'net exists\. Choose another'):
      export.write(path, given)
    assert path.read_text() == 'mine'
    export.write(path, given, overwrite=True)
    assert_same(export.read(path), given)
    assert [p.name for p in tmp_path.iterdir()] == ['net']
    with pytest.raises(ValueError, match='is a folder'):
      export.write(tmp_path, given, overwrite=True)

  def test_missing_folder_is_named(self, tmp_path):
    with pytest.raises(ValueError, match=r'cannot write .*none/net'):
      export.write(tmp_path / 'none' / 'net', network())

  def test_masks_and_weights_that_cannot_be_are_refused(self, tmp_path):
    theta = {'net/a': {'w': jnp.ones((2, 3))}}
    for masks in (
      {'net/a': {'w': jnp.ones((3, 2), bool)}},
      {'net/b': {'w': jnp.ones((2, 3), bool)}},
      {'net/a': {'w': jnp.ones((2, 3))}},
    ):
      with pytest.raises(ValueError, match='net/a/w'):
        export.write(tmp_path / 'net', Exported(theta, masks, {}, {}))
    twice = {'a/b': {'w': jnp.ones(2)}, 'a': {'b': {'w': jnp.ones(2)}}}
    for theta, message in (
      (twice, "two leaves that are called 'a/b/w'"),
      ({'a': {'w': np.ones(2, np.complex128)}}, 'ta/a/w, which is complex128'),
    ):
      given = Exported(theta, masks_lib.full_masks(theta), {}, {})
      with pytest.raises(ValueError, match=message):
        export.write(tmp_path / 'net', given)
    assert not list(tmp_path.iterdir())

  @pytest.mark.parametrize('format', FORMATS)
  def test_any_tree_comes_back_in_its_own_containers(self, tmp_path, format):
    theta = [{'enc': {'fc': {'kernel': jnp.eye(3)}}}, (jnp.ones(2),)]
    masks = jax.tree.map(lambda x: x != 0, theta)
    path = export.write(
      tmp_path / 'net', Exported(theta, masks, {}, {}), format=format
    )
    found = exported.restored(export.read(path).theta, theta)
    chex.assert_trees_all_equal(found, theta)
    with pytest.raises(ValueError, match='in one of them alone: 1/0'):
      exported.restored(export.read(path).theta, theta[:1])


@pytest.mark.parametrize('format', FORMATS)
def test_description_may_hold_what_json_can_and_arrays(tmp_path, format):
  theta = {'a': {'w': np.ones((2, 3), np.float32)}}
  about = {
    'alpha': np.float32(3),
    'scores': {'loss': jnp.float32(0.5), 'counts': np.arange(2)},
    'shape': (2, 3),
  }
  network = Exported(theta, masks_lib.full_masks(theta), {}, about)
  path = export.write(tmp_path / 'net', network, format=format)
  assert export.read(path).about == {
    'alpha': 3.0,
    'scores': {'loss': 0.5, 'counts': [0, 1]},
    'shape': [2, 3],
  }
  network = network._replace(about={'run': {'select': print}})
  with pytest.raises(TypeError, match=r'about\.run\.select: .* is not JSON'):
    export.write(tmp_path / 'other', network, format=format)
  assert list(tmp_path.iterdir()) == [path]
