"""Networks: their sizes in the literature, the inputs they take or refuse."""

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import nets
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees

MNIST, CIFAR, DIGITS = (28, 28, 1), (32, 32, 3), (8, 8, 1)

# deep_nets_test has the others.
SHALLOW = (
  'lenet_300_100',
  'lenet_5',
  'lenet_5_relu',
  'lenet_5_small',
  'mlp',
  'mnist_cnn',
  'cifar_cnn',
  'alexnet_s',
)


def shapes_of(name, image_shape, num_classes=10):
  """Parameters and state as shapes, without computing anything."""
  net = nets.make(name, num_classes)
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  init = lambda key, x: net.init(key, x, True)
  return jax.eval_shape(init, jax.random.key(0), images)


def count(theta, name=None):
  return sum(
    leaf.value.size
    for leaf in trees.named_leaves(theta)
    if name is None or leaf.name == name
  )


class SizeTest(parameterized.TestCase):
  @parameterized.parameters(
    ('lenet_300_100', MNIST, 266_200, 410),
    ('lenet_5', MNIST, 430_500, 580),
    ('lenet_5_relu', MNIST, 430_500, 580),
    ('lenet_5_small', CIFAR, 61_510, 0),
    ('lenet_5_small', MNIST, 61_210, 0),
    ('mlp', MNIST, 79_400, 110),
    ('mnist_cnn', MNIST, 421_408, 234),
    ('cifar_cnn', CIFAR, 356_448, 362),
    ('alexnet_s', CIFAR, 5_066_784, 3_434),
  )
  def test_counts_are_those_of_the_literature(
    self, name, image_shape, num_weights, num_biases
  ):
    theta, _ = shapes_of(name, image_shape)
    self.assertEqual(count(theta, 'w'), num_weights)
    self.assertEqual(count(theta, 'b'), num_biases)

  @parameterized.parameters(
    ('lenet_300_100', 3), ('lenet_5', 4), ('lenet_5_small', 5), ('mlp', 2),
    ('mnist_cnn', 4), ('cifar_cnn', 5), ('alexnet_s', 8),
  )  # fmt: skip
  def test_weights_are_selected_and_norms_are_not(self, name, num_layers):
    theta, _ = shapes_of(name, CIFAR)
    chosen = select_lib.selected_names(select_lib.is_weight, theta)
    self.assertLen(chosen, num_layers)
    self.assertLen([n for n in chosen if n.endswith('logits/w')], 1)

  def test_layers_of_lenet_5_small_have_the_published_sizes(self):
    theta, _ = shapes_of('lenet_5_small', CIFAR)
    sizes = [leaf.value.size for leaf in trees.named_leaves(theta)]
    self.assertEqual(sizes, [450, 2400, 48_000, 9840, 820])

  def test_alexnet_s_alone_of_the_shallow_has_norms_and_a_state(self):
    for name in SHALLOW:
      theta, state = shapes_of(name, CIFAR)
      is_alexnet = name == 'alexnet_s'
      self.assertEqual(bool(jax.tree.leaves(state)), is_alexnet)
      self.assertEqual(count(theta, 'scale'), 3_424 * is_alexnet)


class ForwardTest(parameterized.TestCase):
  @parameterized.product(
    name=SHALLOW, image_shape=[DIGITS, MNIST, CIFAR, (17, 20, 2)]
  )
  def test_every_shallow_net_takes_every_size(self, name, image_shape):
    if name in ('lenet_5', 'lenet_5_relu') and image_shape == DIGITS:
      with self.assertRaisesRegex(ValueError, 'at least 16×16, got 8×8'):
        shapes_of(name, image_shape)
      return
    net = nets.make(name, 7)
    theta, state = shapes_of(name, image_shape, 7)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    for is_training in (True, False):
      logits, _ = jax.eval_shape(
        lambda *args, is_training=is_training: net.apply(
          *args[:2], None, args[2], is_training
        ),
        theta,
        state,
        images,
      )
      self.assertEqual(logits.shape, (2, 7))

  @parameterized.parameters('lenet_300_100', 'mlp', 'mnist_cnn', 'cifar_cnn')
  def test_logits_start_finite_and_of_order_one(self, name):
    net = nets.make(name, 10)
    images = jax.random.uniform(jax.random.key(1), (16, *DIGITS))
    theta, state = net.init(jax.random.key(0), images, True)
    logits, _ = net.apply(theta, state, None, images, True)
    chex.assert_tree_all_finite(logits)
    self.assertBetween(float(jnp.std(logits)), 0.01, 3.0)

  def test_lenet_5_takes_the_smallest_image_it_claims(self):
    theta, _ = shapes_of('lenet_5', (16, 16, 1))
    self.assertEqual(theta['lenet_5/linear_0']['w'].shape, (50, 500))

  def test_alexnet_s_in_training_normalises_and_updates_its_state(self):
    net = nets.make('alexnet_s', 10)
    images = jax.random.uniform(jax.random.key(1), (4, *DIGITS))
    theta, state = jax.jit(net.init, static_argnums=2)(
      jax.random.key(0), images, True
    )
    apply = jax.jit(net.apply, static_argnums=4)
    logits, trained = apply(theta, state, None, images, True)
    _, evaluated = apply(theta, trained, None, images, False)
    chex.assert_tree_all_finite(logits)
    chex.assert_trees_all_equal(trained, evaluated)
    self.assertFalse(
      jnp.array_equal(
        state['alexnet_s/norm_0/~/mean_ema']['hidden'],
        trained['alexnet_s/norm_0/~/mean_ema']['hidden'],
      )
    )

  @parameterized.parameters(
    ('lenet_5', lambda x: x), ('lenet_5_relu', jax.nn.relu)
  )
  def test_lenet_5_has_activations_where_it_says(self, name, activation):
    net = nets.make(name, 10)
    images = jax.random.normal(jax.random.key(1), (2, *MNIST))
    theta, state = net.init(jax.random.key(0), images, True)
    logits, _ = net.apply(theta, state, None, images, False)
    chex.assert_trees_all_close(
      logits, _lenet_5(theta, images, activation), rtol=1e-4, atol=1e-5
    )

  def test_lenet_5_small_is_three_convolutions_and_average_pools(self):
    net = nets.make('lenet_5_small', 10)
    images = jax.random.normal(jax.random.key(1), (2, *MNIST))
    theta, state = net.init(jax.random.key(0), images, True)
    logits, _ = net.apply(theta, state, None, images, False)
    w = {name.split('/')[-1]: leaf['w'] for name, leaf in theta.items()}
    x = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for i in range(3):
      layer = {'w': w[f'conv_{i}'], 'b': jnp.zeros(1)}
      x = jax.nn.relu(_conv(layer, x))
      x = _patches(x).mean((2, 4)) if i < 2 else x.reshape(2, 120)
    expected = jax.nn.relu(x @ w['linear_0']) @ w['logits']
    chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-5)


def _conv(layer, x):
  dims = ('NHWC', 'HWIO', 'NHWC')
  y = jax.lax.conv_general_dilated(
    x, layer['w'], (1, 1), 'VALID', dimension_numbers=dims
  )
  return y + layer['b'].reshape(1, 1, 1, -1)


def _patches(x):
  n, h, w, c = x.shape
  return x.reshape(n, h // 2, 2, w // 2, 2, c)


def _lenet_5(theta, x, activation):
  """The network once more, in plain JAX."""
  layers = {name.split('/')[-1]: leaf for name, leaf in theta.items()}
  x = _patches(activation(_conv(layers['conv_0'], x))).max((2, 4))
  x = _patches(activation(_conv(layers['conv_1'], x))).max((2, 4))
  x = x.reshape(x.shape[0], -1)
  for name in ('linear_0', 'logits'):
    x = x @ layers[name]['w'] + layers[name]['b'].reshape(1, -1)
    x = jax.nn.relu(x) if name == 'linear_0' else x
  return x


class InitialiserTest(parameterized.TestCase):
  @parameterized.parameters('lenet_300_100', 'cifar_cnn')
  def test_weights_are_truncated_normal_over_fan_in_and_biases_zero(self, name):
    net = nets.make(name, 10)
    theta, _ = net.init(jax.random.key(0), jnp.zeros((1, *CIFAR)), True)
    for leaf in trees.named_leaves(theta):
      if leaf.name == 'b':
        np.testing.assert_array_equal(leaf.value, 0)
      else:
        fan_in = np.prod(leaf.value.shape[:-1])
        std = fan_in**-0.5
        tolerance = 4 * std / np.sqrt(leaf.value.size)
        self.assertAlmostEqual(float(leaf.value.std()), std, delta=tolerance)
        # Two standard deviations of the normal that is cut.
        limit = 2 * std / 0.87962566103423978
        self.assertLessEqual(float(jnp.abs(leaf.value).max()), 1.0001 * limit)


class ErrorTest(parameterized.TestCase):
  def test_unknown_name_lists_the_names_and_suggests_the_closest(self):
    with self.assertRaisesRegex(
      ValueError, "unknown network 'lenet300'.*mean 'lenet_.*There are: lenet_3"
    ):
      nets.make('lenet300', 10)
    with self.assertRaisesRegex(ValueError, "network 'xyz'. There are"):
      nets.make('xyz', 10)

  def test_no_classes_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'num_classes.*got 0'):
      nets.make('mlp', 0)

  @parameterized.parameters(*nets.NAMES)
  def test_images_of_wrong_rank_or_type_are_refused(self, name):
    net = nets.make(name, 10)
    key = jax.random.key(0)
    with self.assertRaisesRegex(ValueError, r'\[N, H, W, C\], got \(2, 784\)'):
      net.init(key, jnp.zeros((2, 784)), True)
    with self.assertRaisesRegex(ValueError, 'got uint8'):
      net.init(key, jnp.zeros((2, *CIFAR), jnp.uint8), True)

  def test_modules_can_be_used_directly(self):
    net = hk.transform(lambda x: nets.LeNet300100(3, name='body')(x))
    theta = net.init(jax.random.key(0), jnp.zeros((1, *DIGITS)))
    self.assertEqual(theta['body/logits']['w'].shape, (100, 3))
