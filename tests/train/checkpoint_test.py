"""A run continues from what was saved, bit by bit, or says why it cannot."""

import contextlib
import functools
import io
import json
import os
import random
import signal
import time
import zlib

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax
import processes
import pytest
import small
from stream_runs import assert_same, to_host

import powerprop_jax as pp
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.runs.errors import UserError


def make_state(
  seed=0,
  units=5,
  inner=optax.adam(1e-3),  # noqa: B008
  alpha=2.0,
  select=pp.is_weight,
  form='recommended',
  **options,
):
  """A state with φ, as a program of a user's own may save it."""
  draw = lambda *shape: jax.random.normal(jax.random.key(seed), shape)
  theta = {'a': {'w': draw(4, units), 'b': jnp.ones(units)}, 'n': draw(2, 2)}
  tx = pp.powerprop(inner, alpha, select, form=form)
  if options:
    tx = pp.rigl(tx, 0.5, stop=900, **options)
  phi, opt_state = pp.init(tx, theta)
  return {
    'phi': phi,
    'opt_state': opt_state,
    'masks': jax.tree.map(lambda x: x > 0, phi),
    'key': jax.random.key(seed + 1),
    'step': jnp.int32(seed),
  }


@pytest.fixture
def saved(tmp_path):
  """A folder with checkpoints of steps 1, 2 and 3."""
  folder = tmp_path / 'checkpoints'
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, make_state(step), {'step': step})
  return folder


def save(folder, state, step=1):
  with checkpoint.Checkpoints(folder) as checkpoints:
    checkpoints.save(step, state)


def restore(folder, template=None):
  if template is None:
    template = jax.eval_shape(make_state)
  said = io.StringIO()
  with (
    contextlib.redirect_stderr(said),
    checkpoint.Checkpoints(folder) as checkpoints,
  ):
    restored = checkpoints.restore_latest(template)
  return restored, said.getvalue().splitlines()


def files_of(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


class RoundTripTest:
  def test_state_comes_back_bit_by_bit(self, saved, capfd):
    restored, lines = restore(saved)
    assert (restored.step, restored.metadata, lines) == (3, {'step': 3}, [])
    assert_same(restored.state, make_state(3))
    for leaf in jax.tree.leaves(restored.state):
      assert isinstance(leaf, jax.Array)
    # A template may be a state.
    assert_same(restore(saved, make_state(7))[0].state, make_state(3))
    assert capfd.readouterr() == ('', '')

  @pytest.mark.parametrize('impl', ['threefry2x32', 'rbg', 'unsafe_rbg'])
  def test_unusual_leaves_come_back(self, tmp_path, impl):
    state = {
      'bf16': jnp.array([1.5, jnp.nan, -0.0], jnp.bfloat16),
      'f16': jnp.float16(0.1),
      'empty': jnp.zeros((0, 3), jnp.int8),
      'keys': jax.random.split(jax.random.key(0, impl=impl), 3),
      'old_key': jax.random.PRNGKey(3),
      'odd name [0] / "x"': (jnp.uint8(255), None, [jnp.array(True)]),
    }
    save(tmp_path, state)
    restored, _ = restore(tmp_path, jax.eval_shape(lambda: state))
    assert_same(restored.state, state)
    signs = jnp.signbit(restored.state['bf16'])
    assert signs.tolist() == [False, False, True]
    drawn = [jax.random.normal(s['keys'][1]) for s in (state, restored.state)]
    assert drawn[0] == drawn[1]

  def test_single_array_is_a_state(self, tmp_path):
    save(tmp_path, jnp.arange(3))
    assert_same(restore(tmp_path, jnp.zeros(3, int))[0].state, jnp.arange(3))

  def test_a_state_may_be_donated_at_once(self, tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state):
      mask = jnp.logical_not(state.pop('mask'))
      return {**jax.tree.map(lambda x: x + 1, state), 'mask': mask}

    state = {'w': jnp.zeros((500, 1000)), 'n': jnp.int32(0)}
    state['mask'] = jnp.zeros((1000, 1001), bool)
    template = jax.eval_shape(lambda: state)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      for step in range(1, 4):
        state = advance(state)
        checkpoints.save(step, state)
        for _ in range(20):
          state = advance(state)
    restored, _ = restore(tmp_path, template)
    expected = 1 + 2 * 21
    assert restored.state['n'] == expected
    assert (restored.state['w'] == expected).all()
    # An odd number of times it was turned round.
    assert restored.state['mask'].all()
    # What was restored may be donated too.
    again = advance(restored.state)
    assert (again['w'] == expected + 1).all()
    assert not again['mask'].any()

  def test_restored_state_compiles_nothing_new(self, saved):
    traced = chex.assert_max_traces(lambda s: s['step'] + 1, n=1)
    step = jax.jit(traced)
    step(make_state())
    step(restore(saved)[0].state)

  @pytest.mark.parametrize(
    'axes', [('x', None), (None, 'x'), (('x', 'y'), None), ('x', 'y'), ()]
  )
  def test_leaves_go_where_the_template_says(self, tmp_path, axes):
    w = jax.random.normal(jax.random.key(0), (8, 16))
    specs = lambda *axes: {
      name: PartitionSpec(*axes if name != 'key' else ())
      for name in ('w', 'mask', 'key')
    }
    _, state = small.on_devices(
      {'w': w, 'mask': w > 0, 'key': jax.random.key(2)}, specs(*axes), False
    )
    save(tmp_path, state)
    templates = [state]
    for num in (4, 1):  # on fewer devices too
      mesh = Mesh(np.array(jax.devices()[:num]), 'x')
      on_mesh = lambda x, spec, mesh=mesh: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
      )
      templates.append(jax.tree.map(on_mesh, state, specs('x')))
    for template in templates:
      restored, _ = restore(tmp_path, template)
      assert_same(restored.state, state)
      for name, leaf in template.items():
        assert restored.state[name].sharding == leaf.sharding
    alone = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state
    )
    restored, _ = restore(tmp_path, alone)
    assert restored.state['w'].devices() == {jax.devices()[0]}


class FolderTest:
  def test_oldest_are_deleted(self, saved):
    with checkpoint.Checkpoints(saved) as checkpoints:
      checkpoints.save(10, make_state())
      checkpoints.wait()
      assert checkpoints.steps() == [2, 3, 10]

  def test_nothing_there_restores_nothing_and_writes_nothing(self, tmp_path):
    assert restore(tmp_path / 'missing') == (None, [])
    assert restore(tmp_path) == (None, [])
    assert not (tmp_path / 'missing').exists()

  def test_same_step_is_kept_and_earlier_step_refused(self, saved):
    with checkpoint.Checkpoints(saved) as checkpoints:
      checkpoints.save(3, make_state(99))
      with pytest.raises(ValueError, match='cannot save step 2'):
        checkpoints.save(2, make_state())
    assert_same(restore(saved)[0].state, make_state(3))

  def test_remains_of_a_killed_save_are_ignored_then_removed(self, saved):
    remains = saved / '4.orbax-checkpoint-tmp-1'
    remains.mkdir()
    assert restore(saved)[0].step == 3
    assert remains.exists()
    with checkpoint.Checkpoints(saved) as checkpoints:
      checkpoints.save(4, make_state(4))
    assert not remains.exists()
    assert_same(restore(saved)[0].state, make_state(4))

  @pytest.mark.parametrize('noticed', ['wait', 'save'])
  def test_what_failed_is_raised_and_can_be_saved_again(
    self, saved, monkeypatch, capsys, noticed
  ):
    def full(*args):
      raise OSError(28, 'No space left on device')

    with checkpoint.Checkpoints(saved) as checkpoints:
      with monkeypatch.context() as patch:
        patch.setattr(checkpoint.json_files, 'write_json', full)
        checkpoints.save(4, make_state(4))
        args = (5, make_state(5)) if noticed == 'save' else ()
        message = r'4 .*No space.*of step 3 is'
        with pytest.raises(checkpoint.SaveError, match=message):
          getattr(checkpoints, noticed)(*args)
      assert {path.name for path in saved.iterdir()} == {'1', '2', '3'}
      checkpoints.check()
      checkpoints.save(4, make_state(4))
      checkpoints.wait()
      assert checkpoints.steps() == [2, 3, 4]
    assert_same(restore(saved)[0].state, make_state(4))
    # On the way out of another failure it is only said.
    monkeypatch.setattr(checkpoint.json_files, 'write_json', full)
    with pytest.raises(KeyError), checkpoint.Checkpoints(saved) as checkpoints:
      checkpoints.save(5, make_state(5))
      raise KeyError
    assert 'cannot save the checkpoint of step 5' in capsys.readouterr().err


class DamageTest:
  @pytest.mark.parametrize('seed', range(12))
  def test_any_damage_is_harmless_or_noticed(self, saved, seed, capfd):
    random_state = random.Random(seed)
    for path in random_state.sample(files_of(saved / '3'), 2):
      size = path.stat().st_size
      match random_state.choice(['delete', 'truncate', 'flip']):
        case 'delete':
          path.unlink()
        case 'truncate':
          os.truncate(path, random_state.randrange(size))
        case 'flip':
          content = bytearray(path.read_bytes())
          content[random_state.randrange(size)] ^= 1
          path.write_bytes(content)
    restored, lines = restore(saved)
    assert_same(restored.state, make_state(restored.step))
    assert restored.metadata == {'step': restored.step}
    assert restored.step == (2 if lines else 3)
    assert (saved / '3').exists()
    assert capfd.readouterr().err == ''

  def test_step_can_be_saved_again_and_nothing_is_lost(self, saved):
    (saved / '3' / 'powerprop_jax.json').unlink()
    damaged = 0
    for again in range(2):
      damaged += len(files_of(saved / '3'))
      with checkpoint.Checkpoints(saved) as checkpoints:
        assert checkpoints.restore_latest(make_state()).step == 2
        checkpoints.save(3, make_state(30 + again))
      restored, lines = restore(saved)
      assert (restored.step, lines) == (3, [])
      assert_same(restored.state, make_state(30 + again))
      assert len(files_of(saved / 'damaged')) == damaged
      (saved / '3' / 'powerprop_jax.json').write_text('{')

  @pytest.mark.parametrize(
    ('template', 'leaf'),
    [
      (lambda: make_state() | {'phi': make_state(units=6)['phi']},
       r"'a'\]\['b'\] is float32\[5\], needed is float32\[6"),
      (lambda: {k: x for k, x in make_state().items() if k != 'key'},
       "has the leaf .*'key'"),
      (lambda: make_state() | {'other': jnp.ones(2)}, 'has no leaf .*other'),
      (lambda: make_state() | {'step': jnp.float32(0)}, r"step'\] is int32"),
      (lambda: make_state() | {'key': jax.random.key(0, impl='rbg')},
       r"'key'\] is key<fry>"),
      # As many bits, and as many bytes of them.
      (lambda: make_state() | {'masks': make_state(units=5)['masks']
       | {'a': {'w': jnp.ones((5, 4), bool), 'b': jnp.ones(5, bool)}}},
       r'is bool\[4, 5\], needed is bool\[5, 4'),
    ],
  )  # fmt: skip
  def test_other_state_is_an_error_naming_the_leaf(self, saved, template, leaf):
    with pytest.raises(UserError, match=leaf) as caught:
      restore(saved, jax.eval_shape(template))
    assert '\n' not in str(caught.value)


class BooleanTest:
  @pytest.mark.parametrize('density', [0.0, 0.1, 0.5, 1.0])
  def test_masks_of_any_shape_come_back(self, tmp_path, density):
    generator = np.random.default_rng(0)
    shapes = [(1,), (8,), (17,), (3, 3, 2, 5), (2, 16), (1, 1), (5, 0), ()]
    state = {
      'masks': [jnp.asarray(generator.random(s) < density) for s in shapes],
      'on_host': np.array([[True, False, True]] * 6).T,
      'key': jax.random.key(4),
    }
    save(tmp_path, state)
    restored, lines = restore(tmp_path, jax.eval_shape(lambda: state))
    assert lines == []
    assert_same(restored.state, jax.tree.map(jnp.asarray, state))

  @pytest.mark.parametrize('density', [0.01, 0.1, 0.5])
  def test_a_mask_takes_one_bit_a_weight(self, tmp_path, density):
    mask = np.random.default_rng(0).random((1000, 1000)) < density
    save(tmp_path, {'masks': {'linear': {'w': jnp.asarray(mask)}}})
    assert sum(f.stat().st_size for f in files_of(tmp_path)) < 130_000


class StaticPartsTest:
  @pytest.mark.parametrize(
    ('saved', 'wanted', 'told'),
    [
      ({}, {'alpha': 1.5}, 'alpha was 2.0, here it is 1.5'),
      ({}, {'alpha': 1.0}, 'alpha was 2.0, here it is 1.0'),
      ({'alpha': {'a': {'w': 2.0}}}, {'alpha': {'a': {'w': 3.0}}},
       'alpha.*w.* was 2.0, here it is 3.0'),
      ({}, {'select': pp.by_regex('.')}, "select chose .*, here .*'n'"),
      ({'select': pp.by_regex('w$', '^n$')}, {'select': pp.by_regex('w$')},
       "select chose .*'n'.*, here it chooses no leaf that is not"),
      ({}, {'form': 'naive'}, 'form was recommended, here it is naive'),
      ({'regrow': 'redraw'}, {'regrow': 'smallest'},
       'regrow was redraw, here it is smallest'),
    ],
  )  # fmt: skip
  def test_another_way_of_making_the_state_is_refused(
    self, tmp_path, saved, wanted, told
  ):
    save(tmp_path, make_state(**saved), 3)
    with pytest.raises(UserError, match=told):
      restore(tmp_path, make_state(**wanted))
    restored, _ = restore(tmp_path, make_state(**saved))
    assert_same(restored.state, make_state(**saved))

  def test_another_predicate_that_chooses_the_same_is_accepted(self, tmp_path):
    save(tmp_path, make_state(), 3)
    same = make_state(select=lambda *leaf: pp.is_weight(*leaf))
    assert restore(tmp_path, same)[0].step == 3

  def test_checkpoints_that_do_not_say_it_are_refused_in_one_line(
    self, tmp_path
  ):
    """As those of early versions, which held a byte for each boolean."""
    save(tmp_path, make_state(), 3)
    (details,) = tmp_path.rglob('powerprop_jax.json')
    saved = json.loads(json.loads(details.read_text())[1])
    del saved['static']
    text = json.dumps(saved)
    details.write_text(json.dumps([zlib.crc32(text.encode()), text]))
    with pytest.raises(
      UserError, match=r'step 3 .* of an early version'
    ) as told:
      restore(tmp_path, make_state())
    assert '\n' not in str(told.value)


class NamedTest:
  def test_a_state_is_read_without_a_template(self, tmp_path):
    state = make_state(regrow='keep') | {'none': jnp.zeros((0, 2))}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.restore_latest(None) is None
      checkpoints.save(3, state)
      found, step, _ = checkpoints.restore_latest(None)
    assert step == 3
    leaves = jax.tree_util.tree_leaves_with_path(to_host(state))
    assert list(found.leaves) == [
      jax.tree_util.keystr(path) for path, _ in leaves
    ]
    chex.assert_trees_all_equal(
      list(found.leaves.values()), [leaf for _, leaf in leaves]
    )
    assert found.static["['opt_state'].regrow"] == 'keep'
    assert found.static["['opt_state'].inner_state.alpha"] == 2.0
    chosen = found.static["['opt_state'].inner_state.select"]
    assert "['phi']['a']['w']" in chosen and "['phi']['a']['b']" not in chosen


_ENDLESS = """
import sys
import jax.numpy as jnp
from powerprop_jax.train.checkpoints import checkpoint
template = {'w': jnp.zeros(50_000), 'n': jnp.int32(0)}
with checkpoint.Checkpoints(sys.argv[1]) as checkpoints:
  restored = checkpoints.restore_latest(template)
  step = restored.step if restored else 0
  while True:
    step += 1
    state = {'w': jnp.full(50_000, float(step)), 'n': jnp.int32(step)}
    checkpoints.save(step, state)
    print(step, flush=True)
"""


class KillTest:
  @pytest.mark.slow
  def test_a_killed_run_never_loses_a_complete_checkpoint(self, tmp_path):
    template = {'w': jnp.zeros(50_000), 'n': jnp.int32(0)}
    random_state = random.Random(0)
    complete = 0
    for _ in range(3):
      with processes.started('-c', _ENDLESS, tmp_path) as process:
        first = int(process.stdout.readline())
        time.sleep(random_state.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        started = [first, *map(int, process.stdout.read().split())][-1]
      assert first == complete + 1
      restored, lines = restore(tmp_path, template)
      # Starting to save a step means that the step before is on disk.
      assert restored.step >= started - 1
      assert restored.state['n'] == restored.step
      assert (restored.state['w'] == restored.step).all()
      assert lines == []
      complete = restored.step
