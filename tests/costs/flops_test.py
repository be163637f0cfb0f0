"""Counts against the figures of the literature, and their arithmetic."""

import functools
import re

from absl.testing import parameterized
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import nets
from powerprop_jax.core import distributions, schedules
from powerprop_jax.core import select as select_lib
from powerprop_jax.costs import flops, layers
from powerprop_jax.costs import training as training_flops
from powerprop_jax.costs.layers import LayerCost

_LAYER = LayerCost('fc/w', 'linear', (4, 2), 8, 2, 2, 8)


@functools.cache
def _costs(name, num_classes, *shape):
  images = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
  return layers.layer_costs(nets.make(name, num_classes), images, True)


def _theta(costs):
  return {
    cost.leaf.removesuffix('/w'): {
      'w': jax.ShapeDtypeStruct(cost.shape, jnp.float32)
    }
    for cost in costs
  }


def _share_out(costs, distribution, sparsity, first_dense):
  select = select_lib.is_weight
  if first_dense:
    select = select_lib.exclude(select, f'^{re.escape(costs[0].leaf)}$')
  share_out = getattr(distributions, distribution)
  return share_out(_theta(costs), sparsity, select=select)


class ResNet50Test(parameterized.TestCase):
  """Rigging the lottery (https://arxiv.org/abs/1911.11134) and its code."""

  costs = property(lambda self: _costs('resnet_50', 1000, 224, 224, 3))
  dense = property(lambda self: flops.inference_flops(self.costs))

  def test_dense(self):
    counts = flops.inference_counts(self.costs)
    self.assertLen(self.costs, 54)
    self.assertEqual(counts.weights, 25_502_912)
    self.assertEqual(counts.nonzeros, 25_502_912)
    self.assertEqual(sum(cost.macs for cost in self.costs), 4_089_184_256)
    self.assertAlmostEqual(counts.flops / 1e9, 8.1895, places=4)
    self.assertAlmostEqual(flops.model_bytes(self.costs) / 1e6, 102.122, 3)
    training = training_flops.training_flops('dense', self.dense)
    self.assertAlmostEqual(32_000 * 4096 * training / 1e18, 3.2202, places=4)

  # What the rule gives; tests/studies/flops_table_test.py compares everything
  # that was published.
  @parameterized.parameters(
    ('uniform', 0.8, True, 0.2241, 23.729),
    ('uniform', 0.965, True, 0.0641, 6.904),
    ('erk', 0.8, False, 0.4146, 23.684),
    ('erk', 0.965, False, 0.0864, 6.869),
    ('erk', 0.965, True, 0.1111, 6.904),
    ('erk', 0.99, True, 0.0533, 4.354),
    ('er', 0.8, False, 0.4537, 23.685),
    ('er', 0.95, False, 0.1437, 8.398),
  )
  def test_inference(self, name, sparsity, first_dense, expected, megabytes):
    sparsities = _share_out(self.costs, name, sparsity, first_dense)
    ratio = flops.inference_flops(self.costs, sparsities) / self.dense
    self.assertAlmostEqual(ratio, expected, delta=5e-5)
    size = flops.model_bytes(self.costs, sparsities) / 1e6
    self.assertAlmostEqual(size, megabytes, delta=6e-4)

  def test_training_with_gradual_pruning(self):
    schedule = schedules.polynomial(0.8, 10_000, 25_000)
    over_time = []
    for s in np.asarray(schedule(np.arange(0, 32_001, 1000))):
      sparsities = _share_out(self.costs, 'uniform', float(s), True)
      over_time.append(flops.inference_flops(self.costs, sparsities))
    ratio = training_flops.training_multiplier('pruning', self.dense, over_time)
    self.assertAlmostEqual(ratio, 0.5596, delta=1e-4)


class SmallNetworksTest(parameterized.TestCase):
  # SBP, VIB and RigL, whose appendix B lists them: pixels and units that are
  # left, the sparsity of their weights (rounded), thousand FLOPs and bytes.
  @parameterized.parameters(
    ((245, 160, 55), 0.0, 97.1, 195_100, 0),
    ((97, 71, 33), 0.0, 19.1, 38_696, 0),
    ((375, 62, 51), 0.886, 6.2, 16_113, 30),
  )
  def test_multilayer_perceptrons_on_mnist(
    self, sizes, sparsity, kiloflops, size, tolerance
  ):
    pixels, *hidden = sizes
    net = hk.transform(lambda x: hk.nets.MLP([*hidden, 10])(x))
    images = jax.ShapeDtypeStruct((1, pixels), jnp.float32)
    costs = layers.layer_costs(net, images)
    by_leaf = {cost.leaf: sparsity for cost in costs}
    counted = flops.inference_flops(costs, by_leaf, count_relu=False)
    self.assertAlmostEqual(counted / 1e3, kiloflops, delta=0.07)
    self.assertAlmostEqual(
      flops.model_bytes(costs, by_leaf), size, delta=tolerance
    )

  def test_wide_resnet(self):
    # Without biases, as in https://arxiv.org/abs/2103.15767.
    costs = _costs('wrn_22_2', 10, 32, 32, 3)
    counts = flops.inference_counts(costs, count_bias=False)
    self.assertEqual((counts.weights, counts.biases), (1_076_912, 0))
    self.assertAlmostEqual(counts.flops / 1e8, 3.1546, places=4)
    training = training_flops.training_flops('dense', counts.flops)
    self.assertAlmostEqual(training / 1e8, 9.45, delta=0.02)

  def test_lenet_300_100(self):
    counts = flops.inference_counts(_costs('lenet_300_100', 10, 28, 28, 1))
    self.assertEqual((counts.weights, counts.biases), (266_200, 410))
    self.assertEqual(counts.multiplications, 266_200 + 410)
    self.assertEqual(counts.additions, 266_200)

  def test_mobilenet(self):
    net = hk.transform_with_state(
      lambda x: hk.nets.MobileNetV1(
        strides=(1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1),
        channels=(64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024),
        num_classes=1000,
      )(x, is_training=True)
    )
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    costs = layers.layer_costs(net, images)
    self.assertAlmostEqual(flops.inference_flops(costs) / 1e9, 1.14, delta=0.01)
    # The published size has no biases for the depthwise layers.
    biases = sum(cost.biases for cost in costs if cost.kind == 'depthwise')
    size = flops.model_bytes(costs) - 4 * biases
    self.assertAlmostEqual(size / 1e6, 16.864, delta=6e-4)


class ArithmeticTest(parameterized.TestCase):
  @parameterized.product(count_bias=[False, True], count_relu=[False, True])
  def test_a_dot_product_of_four_is_four_products_and_three_sums(
    self, count_bias, count_relu
  ):
    counts = flops.inference_counts(
      [_LAYER], count_bias=count_bias, count_relu=count_relu
    )
    self.assertEqual(counts.multiplications, 8 + 2 * count_relu)
    self.assertEqual(counts.additions, 6 + 2 * count_bias)
    self.assertEqual(counts.biases, 2 * count_bias)

  def test_masks_count_as_the_sparsities_that_they_have(self):
    costs = [_LAYER, _LAYER._replace(leaf='out/w')]
    mask = np.array(
      [[True, False], [False, False], [True, True], [True, False]]
    )
    tree = {
      'fc': {'w': jnp.asarray(mask), 'b': jnp.ones(2, bool)},
      'out': {'w': jnp.ones((4, 2), bool), 'b': jnp.ones(2, bool)},
    }
    of_masks = flops.inference_counts(costs, tree)
    self.assertEqual(of_masks.nonzeros, 4 + 8)
    self.assertEqual(of_masks, flops.inference_counts(costs, {'fc/w': 0.5}))
    # A dense leaf has no mask: 12 values, 4 biases, and 8 bits.
    self.assertEqual(flops.model_bytes(costs, tree), 4 * 16 + 1)

  def test_corner_cases(self):
    count = flops.inference_counts
    # An empty mask leaves the bias, and no count is negative.
    empty = {'fc': {'w': np.zeros((4, 2), bool)}}
    self.assertEqual(count([_LAYER], empty), (8, 0, 2, 2, 0))
    off = dict(count_bias=False, count_relu=False)
    self.assertEqual(count([_LAYER], {'fc/w': 0.9}, **off).additions, 0)
    # Products of activations have no zeros, bias or ReLU.
    attention = LayerCost(None, 'activations', (), 0, 0, 10, 100)
    self.assertEqual(count([attention], {'fc/w': 0.0}), (0, 0, 0, 100, 90))
    # Decimals are exact.
    layer = _LAYER._replace(shape=(100, 10), weights=1000, macs=1000)
    self.assertEqual(count([layer], {'fc/w': np.float32(0.9)}).nonzeros, 100)

  @parameterized.parameters(
    ({'fc/w': 1.0}, r'sparsity of fc/w must be in \[0, 1\), got 1.0'),
    ({'fc/w': float('nan')}, 'got nan'),
    ({'fc/v': 0.5}, r'fc/v is no layer.*The layers are: fc/w'),
    ({'fc': {'w': np.ones((2, 4), bool)}}, r'\(2, 4\).*\(4, 2\)'),
    ({'fc': {'b': np.zeros(2, bool)}}, 'fc/b is no layer'),
    ({'fc': {'w': np.ones((4, 2))}}, 'mask of booleans'),
  )
  def test_what_cannot_be_counted_is_refused(self, sparsities, message):
    with self.assertRaisesRegex(ValueError, message):
      flops.inference_counts([_LAYER], sparsities)

  def test_the_last_row_adds_up_the_others(self):
    costs = _costs('lenet_5', 10, 28, 28, 1)
    sparsities = distributions.erk(_theta(costs), 0.9)
    *rows, total = flops.flops_rows(costs, sparsities)
    leaves = [row['leaf'] for row in (*rows, total)]
    self.assertEqual(leaves, [*(cost.leaf for cost in costs), 'total'])
    self.assertAlmostEqual(total['sparsity'], 0.9)
    for field in ('weights', 'kept', 'macs', 'flops'):
      self.assertAlmostEqual(
        total[field], sum(row[field] for row in rows), delta=len(rows)
      )
    self.assertEqual(
      total['flops'], round(flops.inference_flops(costs, sparsities))
    )
