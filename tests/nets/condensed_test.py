"""Condensed layers: the same numbers as masked ones, and less memory."""

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from powerprop_jax.nets.layers import condensed, dct
from powerprop_jax.optim import aliases, views
from powerprop_jax.sparse import kernel_choice
from powerprop_jax.sparse import weight as sparse_weight


def _mask(shape, density, seed=0):
  return np.random.default_rng(seed).random(shape) < density


def _transformed(module, *args, **kwargs):
  return hk.transform_with_state(lambda x: module(*args, **kwargs)(x))


def _random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


class SupportTest(parameterized.TestCase):
  def test_expand_undoes_condense(self):
    mask = _mask((5, 7), 0.3)
    theta = {
      'linear': {'w': _random(5, 7), 'b': jnp.ones(7)},
      'norm': {'scale': jnp.ones(7)},
    }
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), theta)
    masks['linear']['w'] = jnp.asarray(mask)
    thin = sparse_weight.condense(theta, masks)
    assert sorted(thin['linear']) == ['b', 'values']
    assert thin['linear']['values'].shape == (mask.sum(),)
    dense = sparse_weight.expand(thin, sparse_weight.supports(masks))
    theta['linear']['w'] = jnp.where(mask, theta['linear']['w'], 0)
    chex.assert_trees_all_equal(dense, theta)

  def test_positions_are_those_of_the_mask_output_by_output(self):
    mask = _mask((2, 3, 4, 5), 0.5)
    positions, shape = sparse_weight.support(jnp.asarray(mask))
    assert positions.dtype == np.int32 and shape == mask.shape
    by_output = np.moveaxis(mask, -1, 0)
    np.testing.assert_array_equal(positions, np.flatnonzero(by_output))

  def test_an_empty_layer_has_no_values(self):
    support = sparse_weight.support(np.zeros((2, 3), bool))
    net = _transformed(condensed.CondensedLinear, 3, support=support)
    x = jnp.ones((4, 2))
    theta, net_state = net.init(jax.random.key(0), x)
    assert theta['condensed_linear']['values'].size == 0
    y, _ = net.apply(theta, net_state, None, x)
    np.testing.assert_array_equal(y, np.zeros((4, 3)))

  def test_faster_supports_are_those_measured_to_be(self):
    masks = {
      'thin': {'w': _mask((512, 256), 0.01)},
      'full': {'w': _mask((256, 512), 0.99)},
      'tiny': {'w': _mask((512, 4), 0.5)},
    }
    found = sparse_weight.supports(masks)

    def make_net(supports):
      def forward(x):
        for name in masks:
          support = supports[f'{name}/w']
          width = support.shape[-1]
          x = condensed.CondensedLinear(width, support=support, name=name)(x)
        return x

      return hk.transform_with_state(forward)

    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    tasks = sparse_weight.products(found, make_net, x)
    assert set(tasks) == set(found)
    assert tasks['tiny/w'] == kernel_choice.Product(
      512, 4, int(masks['tiny']['w'].sum()), 64
    )
    for backward in (True, False):
      faster = sparse_weight.faster_supports(
        found, make_net, x, backward=backward
      )
      assert faster == {
        path: found[path]
        for path, task in tasks.items()
        if kernel_choice.pays(task, backward=backward)
      }
      assert 'tiny/w' not in faster

  def test_bad_masks_are_refused(self):
    with pytest.raises(TypeError, match='must be boolean, got float32'):
      sparse_weight.support(jnp.ones(3))
    with pytest.raises(TypeError, match='outside of jit'):
      jax.jit(sparse_weight.support)(jnp.ones(3, bool))
    mask = {'linear': {'w': jnp.ones((2, 2), bool)}}
    with pytest.raises(ValueError, match='linear has two selected leaves'):
      sparse_weight.condense(
        {'linear': {'w': jnp.ones(2), 'v': jnp.ones(2)}},
        {'linear': {'w': jnp.ones(2, bool), 'v': jnp.ones(2, bool)}},
        select=lambda *_: True,
      )
    with pytest.raises(ValueError, match="needs 4 values and 'linear' has 3"):
      sparse_weight.expand(
        {'linear': {'values': jnp.ones(3)}}, sparse_weight.supports(mask)
      )
    with pytest.raises(ValueError, match="needs 4 values and 'linear' has non"):
      sparse_weight.expand({}, sparse_weight.supports(mask))


def _train(net, tx, theta, net_state, x, target, num_steps=5):
  """θ after some steps, and the state of the network."""

  @jax.jit
  def step(phi, opt_state, net_state):
    def loss_fn(theta):
      y, after = net.apply(theta, net_state, None, x)
      return jnp.mean((y - target) ** 2), after

    theta = views.effective_params(phi, opt_state)
    grads, net_state = jax.grad(loss_fn, has_aux=True)(theta)
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state, net_state

  phi, opt_state = views.init(tx, theta)
  for _ in range(num_steps):
    phi, opt_state, net_state = step(phi, opt_state, net_state)
  return views.effective_params(phi, opt_state), net_state


_LINEAR = (30, 20), (3, 30), (20,), {}
_CONV = (3, 3, 4, 6), (2, 5, 5, 4), (6, 3), {}
_GROUPS = (
  (3, 3, 2, 6), (2, 4, 5, 5), (6, 3),
  {'feature_group_count': 2, 'data_format': 'NCHW', 'stride': 2},
)  # fmt: skip
_LAYERS = {
  'linear': (*_LINEAR, hk.Linear, condensed.CondensedLinear),
  'vector': (
    (50, 40), (1, 50), (40,), {'with_bias': False},
    hk.Linear, condensed.CondensedLinear,
  ),
  'conv': (*_CONV, hk.Conv2D, condensed.CondensedConv2D),
  'groups': (*_GROUPS, hk.Conv2D, condensed.CondensedConv2D),
  **{
    f'{name}, {method}': (
      *where, {**settings, 'method': method}, module, module
    )
    for name, (*where, settings), module in (
      ('dct', _LINEAR, dct.DctLinear),
      ('dct conv', _CONV, dct.DctConv2D),
      ('dct groups', _GROUPS, dct.DctConv2D),
    )
    for method in ('matrix', 'fft')
  },
}  # fmt: skip


class LayersTest(parameterized.TestCase):
  @parameterized.product(
    layer=tuple(_LAYERS),
    inner=(optax.sgd(0.1, momentum=0.9), optax.adam(1e-2, eps=1e-3)),
  )
  def test_masked_and_condensed_layers_train_identically(self, layer, inner):
    shape, x_shape, args, settings, plain, thin = _LAYERS[layer]
    mask = _mask(shape, 0.1)
    x = _random(*x_shape)
    support = sparse_weight.support(mask)
    settings = dict(settings, name='layer')
    dense_net = _transformed(plain, *args, **settings)
    thin_net = _transformed(thin, *args, **settings, support=support)
    key = jax.random.key(1)
    theta, net_state = dense_net.init(key, x)
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), theta)
    masks['layer']['w'] = jnp.asarray(mask)
    thin_theta, thin_state = thin_net.init(key, x)
    condense = lambda theta: sparse_weight.condense(theta, masks)
    # Both start with the same weights.
    chex.assert_trees_all_equal(thin_theta, condense(theta))

    y, _ = dense_net.apply(theta, net_state, None, x)
    target = _random(*y.shape, seed=2)
    tx = aliases.static(inner, masks=masks)
    theta, _ = _train(dense_net, tx, theta, net_state, x, target)
    after, thin_state = _train(
      thin_net, inner, thin_theta, thin_state, x, target
    )
    chex.assert_trees_all_close(after, condense(theta), atol=1e-6)
    for name, leaf in after['layer'].items():
      assert not jnp.array_equal(leaf, thin_theta['layer'][name])
    np.testing.assert_array_equal(
      thin_state['layer']['positions'], support.positions
    )

  def test_state_grows_with_the_connections(self):
    support = sparse_weight.support(_mask((400, 500), 0.001))
    net = _transformed(condensed.CondensedLinear, 500, support=support)
    theta, net_state = net.init(jax.random.key(0), jnp.ones((1, 400)))
    opt_state = optax.adam(0.1).init(theta)
    held = sum(x.nbytes for x in jax.tree.leaves((theta, net_state, opt_state)))
    # Values and two moments, and three numbers to find each connection by; the
    # bias and its moments; a counter; where the connections of each output and
    # input begin.
    nnz = support.positions.size
    assert held == 4 * (6 * nnz + 3 * 500 + 1 + 501 + 401)

  @parameterized.parameters(0.01, 0.5)
  def test_works_in_scan_and_vmap_with_a_support_of_its_own_each(self, density):
    masks = [_mask((30, 20), density, seed) for seed in range(2)]
    size = min(mask.sum() for mask in masks)
    supports = [
      sparse_weight.Support(
        sparse_weight.support(mask).positions[:size], mask.shape
      )
      for mask in masks
    ]
    nets = [
      _transformed(condensed.CondensedLinear, 20, support=support)
      for support in supports
    ]
    x = _random(3, 30)
    starts = [net.init(jax.random.key(i), x) for i, net in enumerate(nets)]
    expected = [
      net.apply(*start, None, x)[0]
      for net, start in zip(nets, starts, strict=True)
    ]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *starts)
    # Positions come from the state, so one program serves both.
    apply = lambda start: nets[0].apply(*start, None, x)[0]
    found = jax.jit(jax.vmap(apply))(stacked)
    chex.assert_trees_all_close(found, jnp.stack(expected), atol=1e-6)
    _, found = jax.lax.scan(lambda c, s: (c, apply(s)), None, stacked)
    chex.assert_trees_all_close(found, jnp.stack(expected), atol=1e-6)

  def test_supports_that_do_not_fit_are_refused(self):
    x = jnp.ones((1, 3))

    def init(support):
      net = _transformed(condensed.CondensedLinear, 2, support=support)
      return net.init(jax.random.key(0), x)

    with pytest.raises(
      ValueError,
      match=r'condensed_linear has a weight of shape \(3, 2\) .* \(2, 3\)',
    ):
      init(sparse_weight.support(np.ones((2, 3), bool)))
    for positions in ([1, 0], [1, 1], [-1, 2], [3, 6]):
      bad = sparse_weight.Support(np.array(positions, np.int32), (3, 2))
      with pytest.raises(ValueError, match=r'ascending and in \[0, 6\)'):
        init(bad)

  def test_mask_and_support_exclude_each_other(self):
    mask = np.ones((1, 1, 1, 1), bool)
    net = _transformed(
      condensed.CondensedConv2D,
      *(1, 1),
      mask=jnp.asarray(mask),
      support=sparse_weight.support(mask),
    )
    with pytest.raises(ValueError, match='has a support and a mask'):
      net.init(jax.random.key(0), jnp.ones((1, 2, 2, 1)))

  def test_needs_a_transform_with_state(self):
    support = sparse_weight.support(np.ones((3, 2), bool))
    forward = lambda x: condensed.CondensedLinear(2, support=support)(x)
    x = jnp.ones((1, 3))
    with pytest.raises(ValueError, match='transform_with_state'):
      hk.transform(forward).init(jax.random.key(0), x)
    theta, _ = hk.transform_with_state(forward).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="connections as 'positions'"):
      hk.transform(forward).apply(theta, None, x)
