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
from powerprop_jax.sparse import weight as sparse_weight


def _mask(shape, density, seed=0):
  return np.random.default_rng(seed).random(shape) < density


def _transformed(module, *args, **kwargs):
  return hk.transform_with_state(lambda x: module(*args, **kwargs)(x))


def _random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _train(net, tx, theta, net_state, x, target, num_steps=5):
  """θ after some steps."""

  def loss_fn(theta):
    y, after = net.apply(theta, net_state, None, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, net_state)
    return jnp.mean((y - target) ** 2)

  @jax.jit
  def step(phi, opt_state):
    grads = jax.grad(loss_fn)(views.effective_params(phi, opt_state))
    updates, opt_state = tx.update(grads, opt_state, phi)
    return optax.apply_updates(phi, updates), opt_state

  phi, opt_state = views.init(tx, theta)
  for _ in range(num_steps):
    phi, opt_state = step(phi, opt_state)
  return views.effective_params(phi, opt_state)


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
  @pytest.mark.slow
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
    theta = _train(dense_net, tx, theta, net_state, x, target)
    after = _train(thin_net, inner, thin_theta, thin_state, x, target)
    chex.assert_trees_all_close(after, condense(theta), atol=1e-6)
    for name, leaf in after['layer'].items():
      assert not jnp.array_equal(leaf, thin_theta['layer'][name])
    _, thin_state = thin_net.apply(thin_theta, thin_state, None, x)
    np.testing.assert_array_equal(
      thin_state['layer']['positions'], support.positions
    )

  def test_an_empty_layer_has_no_values(self):
    support = sparse_weight.support(np.zeros((2, 3), bool))
    net = _transformed(condensed.CondensedLinear, 3, support=support)
    x = jnp.ones((4, 2))
    theta, net_state = net.init(jax.random.key(0), x)
    assert theta['condensed_linear']['values'].size == 0
    y, _ = net.apply(theta, net_state, None, x)
    np.testing.assert_array_equal(y, np.zeros((4, 3)))

  @parameterized.parameters(0.01, 0.5)
  def test_works_in_scan_and_vmap_with_a_support_of_its_own_each(self, density):
    masks = [_mask((30, 20), density, seed) for seed in range(2)]
    size = min(mask.sum() for mask in masks)
    nets = []
    for mask in masks:
      positions, shape = sparse_weight.support(mask)
      support = sparse_weight.Support(positions[:size], shape)
      net = _transformed(condensed.CondensedLinear, 20, support=support)
      nets.append(net)
    x = _random(3, 30)
    starts = [net.init(jax.random.key(i), x) for i, net in enumerate(nets)]
    apply = lambda start, net=nets[0]: net.apply(*start, None, x)[0]
    expected = jnp.stack(list(map(apply, starts, nets)))
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *starts)
    # Positions come from the state, so one program serves both.
    found = jax.jit(jax.vmap(apply))(stacked)
    chex.assert_trees_all_close(found, expected, atol=1e-6)
    _, found = jax.lax.scan(lambda c, s: (c, apply(s)), None, stacked)
    chex.assert_trees_all_close(found, expected, atol=1e-6)

  def test_supports_that_do_not_fit_are_refused(self):
    x = jnp.ones((1, 3))

    def init(support):
      net = _transformed(condensed.CondensedLinear, 2, support=support)
      return net.init(jax.random.key(0), x)

    message = r'linear has a weight of shape \(3, 2\) .* \(2, 3\)'
    with pytest.raises(ValueError, match=message):
      init(sparse_weight.support(np.ones((2, 3), bool)))
    for positions in ([1, 0], [1, 1], [-1, 2], [3, 6]):
      bad = sparse_weight.Support(np.array(positions, np.int32), (3, 2))
      with pytest.raises(ValueError, match=r'ascending and in \[0, 6\)'):
        init(bad)

  def test_mask_and_support_exclude_each_other(self):
    mask = np.ones((1, 1, 1, 1), bool)
    support = sparse_weight.support(mask)
    given = dict(mask=jnp.asarray(mask), support=support)
    net = _transformed(condensed.CondensedConv2D, 1, 1, **given)
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
