"""Signals are measured where they pass, whatever the layers do to them."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import plots
import pytest

from experiments.dct_plus_sparse import figures, propagation
from powerprop_jax import nets
from powerprop_jax.core import masks as masks_lib


def test_a_product_of_matrices_has_the_signals_of_a_hand_calculation():
  def forward(x):
    x = hk.Linear(5, with_bias=False, name='first')(x)
    return hk.Linear(2, with_bias=False, name='second')(x)

  net = hk.without_apply_rng(hk.transform(forward))
  images = jax.random.normal(jax.random.key(1), (7, 3))
  theta = net.init(jax.random.key(0), images)
  masks = masks_lib.full_masks(theta)
  masks['first']['w'] = masks['first']['w'].at[0].set(False)
  half_squares = lambda outputs: jnp.sum(outputs**2) / 2
  measure = functools.partial(
    propagation.signal_propagation, net.apply, half_squares
  )
  found = measure(theta, images, masks=masks)
  x = np.asarray(images, np.float64)
  a = np.asarray(theta['first']['w'], np.float64)
  a[0] = 0
  b = np.asarray(theta['second']['w'], np.float64)
  y = x @ a @ b
  expected = {
    'first': ((x @ a).var(), (x.T @ y @ b.T)[1:]),
    'second': (y.var(), (x @ a).T @ y),
  }
  assert list(found) == ['first', 'second']
  for layer, (variance, gradient) in expected.items():
    np.testing.assert_allclose(found[layer].variance, variance, rtol=1e-5)
    norm = np.linalg.norm(gradient)
    np.testing.assert_allclose(found[layer].gradient_norm, norm, rtol=1e-5)
  # Without connections nothing is passed on.
  masks = jax.tree.map(jnp.zeros_like, masks)
  found = measure(theta, images, masks=masks)
  for record in propagation.signal_records(found):
    assert record['variance'] == record['gradient_norm'] == 0
  with pytest.raises(ValueError, match=r'apply ran none.*first, second'):
    propagation.signal_propagation(
      lambda theta, x: x, half_squares, theta, images
    )
  with pytest.raises(ValueError, match='first/w'):
    measure(theta, images, masks={'second': {'w': jnp.ones(1)}})


def test_a_norm_is_not_part_of_the_layer_before_it():
  def forward(x):
    x = 100 * hk.Linear(4, name='layer')(x)
    return hk.BatchNorm(True, True, 0.9, name='norm')(x, is_training=True)

  net = hk.transform_with_state(forward)
  images = jax.random.normal(jax.random.key(1), (50, 3))
  theta, net_state = net.init(jax.random.key(0), images)
  double = jax.tree.map(lambda t: 2 * t, theta)
  small, large = (
    propagation.signal_propagation(
      lambda t, x: net.apply(t, net_state, None, x)[0], jnp.mean, t, images
    )['layer']
    for t in (theta, double)
  )
  # After a norm, both would be 1.
  np.testing.assert_allclose(large.variance, 4 * small.variance, rtol=1e-5)


@pytest.mark.parametrize(
  'name',
  ['lenet_300_100', pytest.param('lenet_5_small', marks=pytest.mark.slow)],
)
def test_a_cosine_transform_passes_on_what_almost_no_connections_cannot(name):
  images = jax.random.uniform(jax.random.key(1), (16, 28, 28, 1))
  last = {}
  for dct in (False, True):
    net = nets.make(name, 10, dct=dct)
    theta, net_state = net.init(jax.random.key(0), images, True)

    def apply(theta, images, net=net, net_state=net_state):
      return net.apply(theta, net_state, None, images, True)[0]

    masks = masks_lib.full_masks(theta)
    for module, leaves in theta.items():
      w = leaves['w']
      masks[module]['w'] = jnp.arange(w.size).reshape(w.shape) % 100 == 0
    found = propagation.signal_propagation(
      apply, lambda z: jnp.mean(z[:, 0]), theta, images, masks=masks
    )
    assert set(found) == set(theta)
    last[dct] = float(list(found.values())[-1].variance)
  assert last[True] > 100 * last[False]


@pytest.mark.parametrize('num_layers', [1, 3, 30])
def test_the_figure_has_a_line_for_each_network_and_density(num_layers):
  records = [
    {
      **{'network': network, 'density': density, 'key': key},
      'layer': f'net/~/layer_{index}',
      'variance': density / (1 + index) * (network == 'dct'),
      'gradient_norm': 1 + density + key,
    }
    for network in ('standard', 'dct')
    for density in (0.1, 0.01)
    for key in (0, 1)
    for index in range(num_layers)
  ]
  figure = plots.draw(figures.signal_propagation(records, title='LeNet'))
  assert plots.legend(figure) == [
    f'{network}, {share} % of the weights'
    for network in ('standard', 'dct')
    for share in (10, 1)
  ]
  variance, norm = figure.axes
  assert variance.get_yscale() == norm.get_yscale() == 'log'
  found = {
    network: plots.line(variance, f'{network}, 1 % of the weights').get_ydata()
    for network in ('standard', 'dct')
  }
  assert np.isnan(found['standard']).all()
  expected = 0.01 / (1 + np.arange(num_layers))
  np.testing.assert_allclose(found['dct'], expected)
  np.testing.assert_allclose(norm.lines[1].get_ydata(), 1.51)

  with pytest.raises(ValueError, match='gradient_norm'):
    figures.signal_propagation([{'layer': 'linear'}])


def test_accuracies_have_a_pair_of_axes_for_each_support():
  records = [
    {
      **{'support': support, 'network': network, 'density': density},
      **{'alpha': alpha, 'key': key, 'accuracy': 0.5 + 0.1 * key},
    }
    for support in ('erk', 'snip')
    for network in ('standard', 'dct')
    for density in (0.1, 0.001)
    for alpha in (1.0, 2.0)
    for key in (0, 1)
    if (support, network) != ('snip', 'dct')
  ]
  figure = figures.accuracy_by_support(records, title='LeNet', num_classes=10)
  panels = [x for x in plots.draw(figure).axes if x.get_title(loc='left')]
  assert [axes.get_title(loc='left') for axes in panels] == ['erk', 'snip']
  # Lines of two or four networks and α, and that of guessing.
  assert [len(axes.lines) for axes in panels] == [5, 3]
  found = plots.legend(figure)
  assert found[:2] == ['standard, α = 1', 'standard, α = 2']
