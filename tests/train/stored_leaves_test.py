"""Masks are stored as bits and come back as they were; so does the rest."""

import dataclasses
import json
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax import checkpoint as ocp
import pytest

import powerprop_jax as pp
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.runs.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inner:
  masks: jax.Array
  kind: str = dataclasses.field(metadata={'static': True})


def assert_same(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert isinstance(a, jax.Array)
    assert (a == e).all()


def restore(folder, template):
  lines = []
  with checkpoint.Checkpoints(folder, report=lines.append) as checkpoints:
    return checkpoints.restore_latest(template), lines


def files_of(folder):
  return [path for path in folder.rglob('*') if path.is_file()]


class BooleanTest:
  @pytest.mark.parametrize('density', [0.0, 0.1, 0.5, 1.0])
  def test_masks_of_any_shape_come_back(self, tmp_path, density):
    generator = np.random.default_rng(0)
    shapes = [(1,), (8,), (17,), (3, 3, 2, 5), (2, 16), (1, 1), (5, 0), ()]
    state = {
      'masks': [jnp.asarray(generator.random(s) < density) for s in shapes],
      'on_host': np.array([[True, False, True]] * 6).T,
      'key': jax.random.key(4),
      'inner': Inner(jnp.array([True, False]), kind='static'),
    }
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, state)
    restored, lines = restore(tmp_path, jax.eval_shape(lambda: state))
    assert lines == []
    assert_same(restored.state, jax.tree.map(jnp.asarray, state))
    # The memory is JAX's own.
    flipped = jax.jit(
      lambda m: jax.tree.map(jnp.logical_not, m), donate_argnums=0
    )
    chex.assert_trees_all_equal(
      flipped(restored.state['masks']),
      jax.tree.map(lambda m: ~m, state['masks']),
    )

  @pytest.mark.parametrize('density', [0.01, 0.1, 0.5])
  def test_a_mask_takes_one_bit_a_weight(self, tmp_path, density):
    mask = np.random.default_rng(0).random((1000, 1000)) < density
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, {'masks': {'linear': {'w': jnp.asarray(mask)}}})
    assert sum(f.stat().st_size for f in files_of(tmp_path)) < 130_000

  @pytest.mark.parametrize(
    'axes', [('x', None), (None, 'x'), (('x', 'y'), None), ('x', 'y'), ()]
  )
  def test_masks_go_where_the_template_says(self, tmp_path, axes):
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ('x', 'y'))
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*axes)
    )
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (8, 12))
    state = {'mask': jax.device_put(mask, sharding)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, state)
    restored, _ = restore(tmp_path, state)
    assert_same(restored.state, state)
    assert restored.state['mask'].sharding == sharding

  def test_a_state_with_masks_may_be_donated_at_once(self, tmp_path):
    flip = jax.jit(jnp.logical_not, donate_argnums=0)
    mask = jnp.zeros((1000, 1001), bool)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      for step in range(1, 4):
        checkpoints.save(step, {'mask': mask})
        mask = flip(mask)
    template = jax.eval_shape(lambda: {'mask': mask})
    assert not restore(tmp_path, template)[0].state['mask'].any()

  def test_another_shape_is_an_error_that_says_bool(self, tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(1, {'mask': jnp.ones((3, 8), bool)})
    # As many bits, and as many bytes of them.
    with pytest.raises(
      UserError, match=r'is bool\[3, 8\], needed is bool\[8, 3'
    ):
      restore(tmp_path, {'mask': jnp.ones((8, 3), bool)})

  def test_checkpoints_of_unpacked_booleans_are_read(self, tmp_path):
    """Checkpoints of version 0.1.0 hold a byte an entry and do not say so."""
    mask = np.random.default_rng(0).random((5, 9)) < 0.5
    state = {'m': mask, 'w': np.arange(3.0, dtype=np.float32)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(
        tmp_path / '7' / 'state',
        {f"['{name}']": x for name, x in state.items()},
      )
    details = {
      'leaves': {
        "['m']": {'type': 'bool', 'shape': [5, 9]},
        "['w']": {'type': 'float32', 'shape': [3]},
      },
      'metadata': {'epoch': 2},
      'checksums': {
        path.relative_to(tmp_path / '7').as_posix(): [
          path.stat().st_size,
          zlib.crc32(path.read_bytes()),
        ]
        for path in files_of(tmp_path / '7' / 'state')
      },
    }
    text = json.dumps(details)
    (tmp_path / '7' / 'powerprop_jax.json').write_text(
      json.dumps([zlib.crc32(text.encode()), text])
    )
    restored, lines = restore(tmp_path, jax.eval_shape(lambda: state))
    assert (restored.step, restored.metadata, lines) == (7, {'epoch': 2}, [])
    assert_same(restored.state, jax.tree.map(jnp.asarray, state))


def of_powerprop(alpha=2.0, select=pp.is_weight, form='recommended', **options):
  """A state with φ, as a program of a user's own may save it."""
  theta = {
    'a': {'w': jnp.ones((3, 2)), 'b': jnp.ones(2)},
    'n': jnp.ones((2, 2)),
  }
  tx = pp.powerprop(optax.sgd(0.1, 0.9), alpha, select, form=form)
  if options:
    tx = pp.rigl(tx, 0.5, stop=900, **options)
  phi, opt_state = pp.init(tx, theta)
  return {'phi': phi, 'opt_state': opt_state, 'step': jnp.int32(3)}


class StaticPartsTest:
  @pytest.mark.parametrize(
    ('saved', 'wanted', 'told'),
    [
      ({}, {'alpha': 1.5}, 'alpha was 2.0, here it is 1.5'),
      ({}, {'alpha': 1.0}, 'alpha was 2.0, here it is 1.0'),
      (
        {'alpha': {'a': {'w': 2.0}}},
        {'alpha': {'a': {'w': 3.0}}},
        'alpha.*w.* was 2.0, here it is 3.0',
      ),
      ({}, {'select': pp.by_regex('.')}, "select chose .*, here .*'n'"),
      (
        {'select': pp.by_regex('w$', '^n$')},
        {'select': pp.by_regex('w$')},
        "select chose .*'n'.*, here it chooses no leaf that is not",
      ),
      ({}, {'form': 'naive'}, 'form was recommended, here it is naive'),
      (
        {'regrow': 'redraw'},
        {'regrow': 'smallest'},
        'regrow was redraw, here it is smallest',
      ),
    ],
  )
  def test_another_way_of_making_the_state_is_refused(
    self, tmp_path, saved, wanted, told
  ):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(3, of_powerprop(**saved))
    with pytest.raises(UserError, match=told):
      restore(tmp_path, of_powerprop(**wanted))
    restored, _ = restore(tmp_path, of_powerprop(**saved))
    assert_same(restored.state, of_powerprop(**saved))

  def test_another_predicate_that_chooses_the_same_is_accepted(self, tmp_path):
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(3, of_powerprop())
    same = of_powerprop(select=lambda module, name, value: name == 'w')
    assert restore(tmp_path, same)[0].step == 3

  def test_checkpoints_without_static_parts_are_read(self, tmp_path):
    """As they once were, when the key of the masks was a typed one."""
    new = of_powerprop(regrow='redraw')
    key = jax.random.wrap_key_data(new['opt_state'].key, impl='threefry2x32')
    old = {**new, 'opt_state': new['opt_state']._replace(key=key)}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      checkpoints.save(3, old)
    (details,) = tmp_path.rglob('powerprop_jax.json')
    saved = json.loads(json.loads(details.read_text())[1])
    del saved['static']
    text = json.dumps(saved)
    details.write_text(json.dumps([zlib.crc32(text.encode()), text]))
    restored, lines = restore(tmp_path, new)
    assert not lines
    assert_same(restored.state, new)
