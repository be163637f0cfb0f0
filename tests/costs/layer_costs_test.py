from absl.testing import parameterized
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from powerprop_jax import nets
from powerprop_jax.core import select
from powerprop_jax.costs import layers
from powerprop_jax.costs.layers import LayerCost


def _images(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _costs(forward, *inputs):
  return layers.layer_costs(hk.transform(forward), *inputs)


class LayerCostsTest(parameterized.TestCase):
  def test_convolutions(self):
    def forward(x):
      x = hk.Conv2D(8, 3, stride=2, name='conv')(x)
      x = hk.DepthwiseConv2D(2, 3, name='depthwise')(x)
      x = hk.Conv2D(32, 3, feature_group_count=4, name='grouped')(x)
      return hk.Conv2DTranspose(5, 2, stride=2, name='transposed')(x)

    self.assertEqual(
      _costs(forward, _images(2, 9, 7, 3)),
      (
        LayerCost('conv/w', 'conv', (3, 3, 3, 8), 216, 8, 160, 160 * 27),
        LayerCost(
          'depthwise/w', 'depthwise', (3, 3, 1, 16), 144, 16, 320, 320 * 9
        ),
        LayerCost('grouped/w', 'conv', (3, 3, 4, 32), 1152, 32, 640, 640 * 36),
        # Each of the 5×4 positions meets the whole kernel.
        LayerCost(
          'transposed/w', 'conv', (2, 2, 5, 32), 640, 5, 10 * 8 * 5, 20 * 640
        ),
      ),
    )

  def test_a_layer_applied_at_two_places_holds_its_weights_once(self):
    def forward(x):
      layer = hk.Linear(3, name='fc')
      return layer(layer(x))

    for shape, places in (((4, 3), 1), ((2, 7, 3), 7)):
      (cost,) = _costs(forward, _images(*shape))
      expected = ('fc/w', 'linear', (3, 3), 9, 3, places * 6, places * 18)
      self.assertEqual(cost, expected)

  def test_attention_multiplies_activations(self):
    def forward(x):
      w_init = hk.initializers.RandomNormal()
      return hk.MultiHeadAttention(2, 4, w_init=w_init, name='att')(x, x, x)

    costs = _costs(forward, _images(1, 6, 8))
    activations = next(cost for cost in costs if cost.leaf is None)
    # Queries with keys, then weights with values: 2 heads of 6×6×4 each.
    self.assertEqual(
      activations, LayerCost(None, 'activations', (), 0, 0, 120, 576)
    )
    self.assertLen(costs, 5)

  def test_a_recurrent_network(self):
    def forward(xs):
      core = hk.VanillaRNN(4, name='rnn')
      return hk.dynamic_unroll(core, xs, core.initial_state(1))[0]

    costs = _costs(forward, _images(5, 1, 3))
    # Time comes first: counted per step, which is the first axis.
    self.assertEqual([cost.macs for cost in costs], [12, 16])

  def test_embeddings_are_no_layer(self):
    forward = lambda tokens: hk.Linear(2, name='fc')(hk.Embed(10, 3)(tokens))
    (cost,) = _costs(forward, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    self.assertEqual(cost.leaf, 'fc/w')

  @parameterized.parameters(*small.IMAGE_NETS)
  @pytest.mark.slow
  def test_every_weight_of_our_networks_is_a_layer(self, name):
    net = nets.make(name, 10)
    images = _images(2, 32, 32, 3)
    costs = layers.layer_costs(net, images, True)
    made = lambda: net.init(jax.random.key(0), jnp.zeros(images.shape), True)
    theta, _ = jax.eval_shape(made)
    self.assertCountEqual(
      # Attention multiplies activations by each other too.
      [cost.leaf for cost in costs if cost.leaf is not None],
      select.selected_names(select.is_weight, theta),
    )

  def test_neither_training_nor_psi_inside_the_network_changes_the_costs(self):
    net, images = nets.make('lenet_5', 10), _images(3, 28, 28, 1)
    plain = layers.layer_costs(net, images, True)
    evaluated = layers.layer_costs(net, images, is_training=False)
    self.assertEqual(evaluated, plain)

    def forward(images):
      with nets.power_scope(2.0):
        return nets.LeNet5(10)(images, True)

    self.assertEqual(_costs(forward, _images(1, 28, 28, 1)), plain)

  def test_concrete_inputs_cost_what_their_shapes_do(self):
    net = hk.transform(lambda batch: hk.Linear(2)(batch['image']))
    self.assertEqual(
      layers.layer_costs(net, {'image': np.ones((4, 3))}),
      layers.layer_costs(net, {'image': _images(9, 3)}),
    )

  def test_apply_may_want_a_key_or_not(self):
    for transform in (hk.transform, hk.transform_with_state):
      net = transform(lambda x: hk.Linear(2)(x))
      for each in (net, hk.without_apply_rng(net)):
        (cost,) = layers.layer_costs(each, _images(4, 3))
        self.assertEqual(cost.macs, 6)

  def test_what_cannot_be_counted_is_refused(self):
    with self.assertRaisesRegex(TypeError, 'hk.transform'):
      layers.layer_costs(lambda x: x, _images(1, 2))
    with self.assertRaisesRegex(ValueError, 'needs an example'):
      layers.layer_costs(hk.transform(lambda: 0))
    # A first axis that counts no examples.
    for shape, change in (((0, 5), jnp.abs), ((3, 5), jnp.transpose)):
      net = hk.transform(lambda x, change=change: hk.Linear(2)(change(x)))
      with self.assertRaisesRegex(ValueError, 'single example'):
        layers.layer_costs(net, _images(*shape))
