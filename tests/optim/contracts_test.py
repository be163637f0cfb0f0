"""What every transformation promises, for every inner optimiser and wrapper.

A new transformation adds one row to TRANSFORMATIONS. One that masks adds what
it promises, the number of connections after each update, to PROMISES.
"""

import functools
import itertools

import chex
import inners
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

import powerprop_jax as pp
from powerprop_jax.optim import topology
from powerprop_jax.optim.topologies import protected
from powerprop_jax.train.scale import fusing

POWERS = {
  'powerprop': lambda inner: pp.powerprop(inner, 2.0),
  'powerprop_traced': lambda inner: pp.powerprop(inner, jnp.float32(1.7)),
  'powerprop_tree': lambda inner: pp.powerprop(
    inner, {'m': {'w': jnp.float32(2)}, 'n': {'w': 1.5}}
  ),
  'powerprop_naive': lambda inner: pp.powerprop(inner, 2.0, form='naive'),
  'powerprop_decay': lambda inner: optax.chain(
    pp.powerprop(inner, 2.0), pp.decay_phi(1e-3, 0.05)
  ),
  'adaptive_alpha': lambda inner: _adaptive(POWERS['powerprop_traced'](inner)),
}


def _adaptive(tx):
  controller = pp.near_zero_controller(0.3, relative=True)
  return pp.adaptive_alpha(tx, controller, period=3)


_UNIFORM = {'distribution': pp.uniform}
_MOVES = {'period': 3, 'stop': 100}
_PRUNES = {'start': 1, 'stop': 9, 'period': 4}
_power = POWERS['powerprop']
_traced_power = POWERS['powerprop_traced']


def _of(method, power=lambda inner: inner, **options):
  return lambda inner: method(power(inner), 0.5, **options)


SPARSE = {
  'static': _of(pp.static),
  'static_given': lambda inner: pp.static(inner, masks=_given_masks()),
  'static_powerprop': _of(pp.static, _power),
  'gradual': _of(pp.gradual_pruning, **_PRUNES),
  'gradual_global': _of(
    pp.gradual_pruning, _traced_power, scope='global', **_PRUNES
  ),
  'one_shot': _of(pp.one_shot_pruning, _power, step=4),
  'set': _of(pp.sparse_evolution, **_MOVES),
  'set_redraw': _of(pp.sparse_evolution, _power, regrow='redraw', **_MOVES),
  'rigl': _of(pp.rigl, **_MOVES),
  'rigl_keep': _of(pp.rigl, _power, regrow='keep', **_MOVES),
  'rigl_traced': _of(
    pp.rigl, _traced_power, regrow='smallest', **_UNIFORM, **_MOVES
  ),
  'rigl_adaptive': lambda inner: _adaptive(
    pp.rigl(_traced_power(inner), 0.5, regrow='smallest', **_MOVES)
  ),
  'rigl_fan_in': _of(
    pp.rigl, _power, structure='constant_fan_in', **_UNIFORM, **_MOVES
  ),
  'snfs': _of(pp.snfs, **_MOVES),
  'snfs_powerprop': _of(pp.snfs, _power, second_moment=0.99, **_MOVES),
  'dsr': _of(pp.dsr, num_dropped=4, threshold=0.1, **_MOVES),
  'top_kast': _of(pp.top_kast, backward_sparsity=0.2),
  'top_kast_powerprop': _of(
    pp.top_kast, _power, backward_sparsity=0.2, period=3
  ),
  'protected': lambda inner: pp.sparsify(_power(inner), protected.protected()),
}

TRANSFORMATIONS = POWERS | SPARSE

# Number of connections of m/w (of 30) and n/w (of 20), or of both together,
# after a number of updates.
_ERK = lambda num_updates: (14, 11)
_HALF = lambda num_updates: (15, 10)
_TOTAL = lambda num_updates: 25


def _pruned(dense, half, end):
  """Updates 5 and 9 prune, the first of them 7/8 of the zeros."""

  def promise(num_updates):
    return end if num_updates > 9 else half if num_updates > 5 else dense

  return promise


PROMISES = {
  'static': _ERK,
  'static_given': lambda num_updates: (10, 14),
  'static_powerprop': _ERK,
  'gradual': _pruned((30, 20), (17, 12), (15, 10)),
  'gradual_global': _pruned(50, 29, 25),
  'one_shot': lambda num_updates: (15, 10) if num_updates > 4 else (30, 20),
  'set': _ERK,
  'set_redraw': _ERK,
  'rigl': _ERK,
  'rigl_keep': _ERK,
  'rigl_traced': _HALF,
  'rigl_adaptive': _ERK,
  'rigl_fan_in': lambda num_updates: (15, 12),  # 3 inputs for each of 5 and 4
  'snfs': _TOTAL,
  'snfs_powerprop': _TOTAL,
  'dsr': _TOTAL,
  'top_kast': _ERK,
  'top_kast_powerprop': _ERK,
  'protected': lambda num_updates: (30, 20),
}

WRAPPERS = {
  'bare': lambda tx: tx,
  'chain': lambda tx: optax.chain(optax.clip(1.0), tx),
  'multi_steps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}

# Every row meets every inner optimiser; with wrappers, the sparse rows meet
# these only.
_FEW = ('momentum', 'masked_chain')
_EVERY_PAIR = tuple(itertools.product(TRANSFORMATIONS, inners.INNERS))
CASES = (
  *itertools.product(POWERS, inners.INNERS, WRAPPERS),
  *itertools.product(SPARSE, inners.INNERS, ('bare',)),
  *itertools.product(SPARSE, _FEW, ('chain', 'multi_steps')),
)
FEWER_PAIRS = (
  *itertools.product(POWERS, inners.INNERS),
  *itertools.product(SPARSE, ('adam',)),
  *(('rigl', inner) for inner in inners.INNERS if inner != 'adam'),
)


def _given_masks():
  return {
    'm': {'w': jnp.arange(30).reshape(6, 5) % 3 == 0, 'b': jnp.ones(5, bool)},
    'n': {'w': jnp.arange(20).reshape(5, 4) > 5},
  }


def build(transformation, inner, wrapper='bare', change=lambda tx: tx):
  tx = TRANSFORMATIONS[transformation](inners.INNERS[inner]())
  return WRAPPERS[wrapper](change(tx))


def _check_promise(row, phi, opt_state):
  """The promised connections, and nothing in φ where there is none."""
  state = topology.find_sparse_state(opt_state)
  counts = int(state.masks['m']['w'].sum()), int(state.masks['n']['w'].sum())
  promise = PROMISES[row](int(state.step))
  assert (counts if isinstance(promise, tuple) else sum(counts)) == promise
  assert min(counts) >= 1
  assert state.masks['m']['b'].all()
  theta = pp.effective_params(phi, opt_state)
  seen = phi if state.pins else theta
  chex.assert_trees_all_equal(seen, pp.apply_masks(seen, state.masks))
  chex.assert_trees_all_equal(
    theta, pp.effective_params(phi, opt_state, pinned=True)
  )


@pytest.mark.parametrize('transformation', SPARSE)
def test_a_tree_without_leaves_trains(transformation):
  tx = SPARSE[transformation](optax.sgd(0.05))
  phi, opt_state = pp.init(tx, {})
  for _ in range(6):
    updates, opt_state = tx.update({}, opt_state, phi)
    assert updates == {}


@pytest.mark.parametrize('transformation', SPARSE)
def test_flat_slots_are_refused_where_connections_move(transformation):
  tx = SPARSE[transformation](optax.flatten(optax.adam(0.01)))
  if transformation.startswith(('static', 'protected')):
    pp.init(tx, small.weights())
  else:
    with pytest.raises(ValueError, match=r'Leave out optax\.flatten'):
      pp.init(tx, small.weights())


class ContractTest:
  @pytest.mark.parametrize(
    ('transformation', 'inner', 'wrapper'), inners.cases(CASES)
  )
  def test_compiles_once_donates_keeps_types_promises_and_descends(
    self, transformation, inner, wrapper
  ):
    tx = optax.with_extra_args_support(build(transformation, inner, wrapper))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(phi, opt_state):
      theta = pp.effective_params(phi, opt_state)
      loss, grads = jax.value_and_grad(small.loss)(theta)
      updates, opt_state = tx.update(
        grads, opt_state, phi, value=loss, not_a_known_argument=loss
      )
      return optax.apply_updates(phi, updates), opt_state, loss

    phi, opt_state = pp.init(tx, small.weights())
    before = jax.tree.map(lambda x: (x.shape, x.dtype), (phi, opt_state))
    losses, all_masks = [], []
    for _ in range(12):
      if transformation in PROMISES:
        _check_promise(transformation, phi, opt_state)
      masks = pp.current_masks(phi, opt_state)
      all_masks.append(jax.tree.map(np.array, masks))
      phi, opt_state, loss = step(phi, opt_state)
      losses.append(float(loss))
    after = jax.tree.map(lambda x: (x.shape, x.dtype), (phi, opt_state))
    assert before == after
    # New connections may start with any value, and so cost something: steps
    # between two networks of different connections do not count.
    gained = [
      before - after
      for (before, old), (after, new) in itertools.pairwise(
        zip(losses, all_masks, strict=True)
      )
      if jax.tree.all(jax.tree.map(np.array_equal, old, new))
    ]
    assert sum(gained) > 0

  @pytest.mark.parametrize(('transformation', 'inner'), _EVERY_PAIR)
  @pytest.mark.slow
  def test_states_can_be_mapped_like_parameters(self, transformation, inner):
    tx = build(transformation, inner)
    _, opt_state = pp.init(tx, small.weights())
    mapped = optax.tree.map_params(tx, jnp.copy, opt_state, is_leaf=None)
    chex.assert_trees_all_equal(mapped, opt_state)

  @pytest.mark.parametrize(
    ('transformation', 'inner'), inners.cases(FEWER_PAIRS)
  )
  def test_scans_and_batches(self, transformation, inner):
    tx = build(transformation, inner)

    def train(scale):
      theta = jax.tree.map(lambda x: x * scale, small.weights())
      body = lambda carry, _: (small.step(tx, *carry), None)
      end, _ = jax.lax.scan(body, pp.init(tx, theta), length=7)
      return pp.effective_params(*end)

    scales = jnp.array([1.0, 0.5])
    together = jax.jit(jax.vmap(train))(scales)
    alone = jax.jit(train)(scales[1])
    chex.assert_trees_all_close(
      jax.tree.map(lambda x: x[1], together), alone, rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize(
  'make',
  [
    pp.static,
    functools.partial(pp.sparse_evolution, **_MOVES),
    functools.partial(pp.rigl, **_MOVES),
    functools.partial(pp.snfs, **_MOVES),
    functools.partial(pp.dsr, num_dropped=4, threshold=0.1, **_MOVES),
    lambda inner, sparsity, key: _adaptive(inner),
  ],
)
@pytest.mark.slow
def test_lanes_of_keys_and_powers_equal_single_runs(make):
  def train(key, alpha):
    tx = make(pp.powerprop(optax.sgd(0.05), alpha), 0.5, key=key)
    body = lambda carry, _: (small.step(tx, *carry), pp.current_masks(*carry))
    end, masks = jax.lax.scan(body, pp.init(tx, small.weights()), length=9)
    return pp.effective_params(*end), masks

  keys, alphas = jnp.arange(3), jnp.array([1.0, 1.5, 2.0])
  together = jax.jit(jax.vmap(train))(keys, alphas)
  alone = jax.jit(train)
  for i in range(3):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, i=i: x[i], together),
      alone(keys[i], alphas[i]),
      rtol=1e-3,
      atol=1e-4,
    )


@pytest.mark.parametrize(
  ('transformation', 'inner', 'wrapper'),
  inners.cases(
    [case for case in CASES if case[0] in SPARSE and case[1] in _FEW]
    + [(row, 'adam', 'bare') for row in SPARSE]
  ),
)
@pytest.mark.slow
def test_an_update_that_is_written_twice_is_the_same(
  transformation, inner, wrapper
):
  once, twice = (
    small.run(build(transformation, inner, wrapper, change), 9)[-1]
    for change in (lambda tx: tx, fusing.fused)
  )
  chex.assert_trees_all_equal(
    *(pp.current_masks(*state) for state in (once, twice))
  )
  chex.assert_trees_all_close(
    *(pp.effective_params(*state) for state in (once, twice)),
    rtol=1e-4,
    atol=1e-6,
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(once, twice)


@pytest.mark.parametrize('name', [*inners.INNERS, *inners.STARTED])
def test_slots_of_weights_that_come_or_go_start_anew(name):
  """As the optimiser starts them: zero would be an unbounded step of Adagrad.

  Nothing else in the state moves, as RigL replaces the step.
  """
  make = (inners.INNERS | inners.STARTED)[name]
  tx = pp.rigl(make(), 0.5, **_MOVES)
  *_, (_, before), (phi, after) = small.run(tx, 4)
  changed = jax.tree.map(jnp.not_equal, before.masks, after.masks)
  moved = {x.shape: x for x in jax.tree.leaves(changed)}
  assert moved[6, 5].any()
  assert moved[5, 4].any()
  expected = jax.tree.map(
    lambda old, new: jnp.where(moved.get(old.shape, False), new, old),
    before.inner_state,
    make().init(pp.apply_masks(phi, after.masks)),
  )
  chex.assert_trees_all_close(after.inner_state, expected, rtol=1e-6)
  chex.assert_trees_all_equal_structs(after, before)


@pytest.mark.parametrize('alpha', [1.0, 2.0])
def test_hyperparameters_can_be_injected(alpha):
  make = lambda learning_rate, alpha, drop_fraction: pp.rigl(
    pp.powerprop(optax.sgd(learning_rate), alpha),
    0.5,
    drop_fraction=drop_fraction,
    replaces_step=False,
    **_MOVES,
  )
  fall = optax.linear_schedule(0.1, 0.0, 8)
  tx = optax.inject_hyperparams(make)(
    learning_rate=fall, alpha=alpha, drop_fraction=0.5
  )
  before, (phi, opt_state) = small.run(tx, 9)[-2:]
  current = pp.current_masks(phi, opt_state)
  assert opt_state.hyperparams['learning_rate'] == 0
  chex.assert_tree_all_finite(phi)
  # Update 8 is not a multiple of 3.
  chex.assert_trees_all_equal(pp.current_masks(*before), current)
  # The learning rate is 0 now, and the drop fraction no longer.
  opt_state.hyperparams['drop_fraction'] = jnp.float32(1e-6)
  after = small.step(tx, phi, opt_state)
  chex.assert_trees_all_equal(pp.current_masks(*after), current)
