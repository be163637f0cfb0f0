"""Networks: their sizes in the literature, what they compute and refuse."""

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from powerprop_jax import nets
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.nets import layers

MNIST, CIFAR, DIGITS = (28, 28, 1), (32, 32, 3), (8, 8, 1)
PHOTOGRAPH = (224, 224, 3)
# The others have norms, whose statistics are their state.
STATELESS = (
  *('lenet_300_100', 'lenet_5', 'lenet_5_relu', 'lenet_5_small'),
  *('mlp', 'mnist_cnn', 'cifar_cnn', 'fixup_resnet_110', 'vit_tiny'),
)


def shapes_of(name, image_shape=CIFAR, num_classes=10):
  return small.net_shapes(nets.make(name, num_classes), image_shape)


def outputs_of(name, image_shape):
  """Shape of what each layer computes, by its name inside the network."""
  net = nets.make(name, 10)
  shapes = {}

  def record(next_fn, args, kwargs, context):
    out = next_fn(*args, **kwargs)
    if context.method_name == '__call__' and hasattr(out, 'shape'):
      shapes[context.module.module_name.removeprefix(f'{name}/')] = out.shape
    return out

  def init(key, images):
    with hk.experimental.intercept_methods(record):
      return net.init(key, images, True)

  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  jax.eval_shape(init, jax.random.key(0), images)
  return shapes


def evaluated(name, images):
  """Parameters of a network at the start, and its logits."""
  net = nets.make(name, 10)
  theta, state = net.init(jax.random.key(0), images, True)
  return theta, net.apply(theta, state, None, images, False)[0]


def small_wrn(dropout=0.3):
  def forward(*args):
    return nets.WideResNet(3, depth=10, width=1, dropout=dropout)(*args)

  return hk.transform_with_state(forward)


def start(net, images):
  """Weights in NumPy and a state of zeros: compiling init takes seconds."""
  theta, state = small.net_shapes(net, images.shape[1:])
  rng = np.random.default_rng(0)

  def draw(module_name, name, leaf):
    del module_name
    if name == 'w':
      std = np.prod(leaf.shape[:-1]) ** -0.5
      return rng.normal(scale=std, size=leaf.shape).astype(np.float32)
    return np.full(leaf.shape, name == 'scale', np.float32)

  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
  return trees.map_named(draw, theta), zeros


class SizeTest(parameterized.TestCase):
  @parameterized.parameters(
    # Weights of SNFS's and RigL's networks; the papers count 1.5 and 11.0
    # million parameters for WRN-28-2 and WRN-16-8, 25.6 for ResNet-50. Other
    # deep ones have the parameters of the well-known PyTorch networks.
    ('lenet_300_100', MNIST, 10, 3, 266_200, 266_610),
    ('lenet_5', MNIST, 10, 4, 430_500, 431_080),
    ('lenet_5_relu', MNIST, 10, 4, 430_500, 431_080),
    ('lenet_5_small', CIFAR, 10, 5, 61_510, 61_510),
    ('lenet_5_small', MNIST, 10, 5, 61_210, 61_210),
    ('mlp', MNIST, 10, 2, 79_400, 79_510),
    ('mnist_cnn', MNIST, 10, 4, 421_408, 421_642),
    ('cifar_cnn', CIFAR, 10, 5, 356_448, 356_810),
    ('alexnet_s', CIFAR, 10, 8, 5_066_784, 5_077_066),
    ('vgg_like', CIFAR, 10, 15, 14_977_728, 14_991_946),
    ('vgg_c', CIFAR, 10, 16, 11_307_712, 11_323_466),
    ('vgg_d', CIFAR, 10, 16, 15_239_872, 15_255_626),
    ('wrn_22_2', CIFAR, 10, 23, 1_076_912, 1_079_642),
    ('wrn_28_2', CIFAR, 10, 29, 1_463_984, 1_467_610),
    ('wrn_16_8', CIFAR, 10, 17, 10_954_160, 10_961_370),
    ('vgg_19', CIFAR, 10, 17, 20_024_000, 20_035_018),
    ('resnet_18', PHOTOGRAPH, 1000, 21, 11_678_912, 11_689_512),
    ('resnet_50', PHOTOGRAPH, 1000, 54, 25_502_912, 25_557_032),
    ('resnet_18_cifar', CIFAR, 10, 21, 11_164_352, 11_173_962),
    ('resnet_50_cifar', CIFAR, 10, 54, 23_467_712, 23_520_842),
    ('resnet_8', CIFAR, 10, 10, 77_360, 78_042),
    ('resnet_20', CIFAR, 10, 22, 270_896, 272_474),
    ('mobilenet_v2', CIFAR, 10, 53, 2_202_560, 2_236_682),
    ('mobilenet_v2', CIFAR, 1000, 53, 3_469_760, 3_504_872),
    ('fixup_resnet_110', CIFAR, 10, 110, 1_719_856, 1_720_138),
  )
  def test_counts_are_those_of_the_literature(
    self, name, shape, num_classes, num_layers, num_weights, num_parameters
  ):
    theta, state = shapes_of(name, shape, num_classes)
    sizes = {path: x.size for path, x in trees.by_path(theta).items()}
    chosen = select_lib.selected_names(select_lib.is_weight, theta)
    self.assertLen(chosen, num_layers)
    self.assertIn(f'{name}/logits/w', chosen)
    self.assertEqual(sum(sizes[path] for path in chosen), num_weights)
    self.assertEqual(sum(sizes.values()), num_parameters)
    self.assertEqual(bool(jax.tree.leaves(state)), name not in STATELESS)

  @parameterized.parameters(
    # The 3×3 convolutions stride.
    ('resnet_50', PHOTOGRAPH, 112, [(56, 56), (56, 28), (28, 14), (14, 7)]),
    # The first ones stride, and what does not widen is not projected.
    ('resnet_18', PHOTOGRAPH, 112, [(56, 56), (28, 28), (14, 14), (7, 7)]),
    ('resnet_18_cifar', CIFAR, 32, [(32, 32), (16, 16), (8, 8), (4, 4)]),
    ('resnet_20', CIFAR, 32, [(32, 32), (16, 16), (8, 8)]),
  )
  def test_blocks_of_resnets_stride_where_they_say(
    self, name, image_shape, stem, sizes
  ):
    shapes = outputs_of(name, image_shape)
    channels = 16 if name == 'resnet_20' else 64
    self.assertEqual(shapes['stem'], (2, stem, stem, channels))
    for group, expected in enumerate(sizes, 1):
      block = f'group_{group}/block_0'
      found = [shapes[f'{block}/conv_{i}'][1] for i in range(2)]
      self.assertEqual(found, list(expected))
      has_shortcut = name == 'resnet_50' or group > 1
      self.assertEqual(f'{block}/shortcut' in shapes, has_shortcut)
      if has_shortcut:
        self.assertEqual(shapes[f'{block}/shortcut'][1], expected[1])

  def test_mobilenet_strides_three_times(self):
    shapes = outputs_of('mobilenet_v2', CIFAR)
    sizes = [shapes[f'group_{i}/block_0/depthwise'][1] for i in range(1, 8)]
    self.assertEqual(sizes, [32, 32, 16, 8, 8, 4, 4])


class ForwardTest(parameterized.TestCase):
  @parameterized.product(
    name=small.IMAGE_NETS, image_shape=[DIGITS, MNIST, (33, 40, 3)]
  )
  @pytest.mark.slow
  def test_every_net_takes_small_and_odd_images(self, name, image_shape):
    if name in ('lenet_5', 'lenet_5_relu') and image_shape == DIGITS:
      return
    net = nets.make(name, 7)
    theta, state = shapes_of(name, image_shape, 7)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    key = jax.random.key(0)
    for is_training in (True, False):
      apply = lambda *args, mode=is_training: net.apply(*args, mode)
      logits, after = jax.eval_shape(apply, theta, state, key, images)
      self.assertEqual(logits.shape, (2, 7))
      chex.assert_trees_all_equal_shapes_and_dtypes(after, state)

  @parameterized.parameters(
    ('lenet_5', (16, 16, 1), (50, 500)),
    ('lenet_5_relu', (16, 16, 1), (50, 500)),
    ('vgg_c', (4, 4, 3), (512, 512)),
  )
  def test_takes_the_smallest_image_it_claims(self, name, shape, expected):
    theta, _ = shapes_of(name, shape)
    self.assertEqual(theta[f'{name}/linear_0']['w'].shape, expected)
    size = shape[0]
    message = f'at least {size}×{size}, got {size - 1}×40'
    with self.assertRaisesRegex(ValueError, message):
      shapes_of(name, (size - 1, 40, shape[2]))

  @parameterized.parameters(
    ('lenet_5', lambda x: x), ('lenet_5_relu', jax.nn.relu)
  )
  def test_lenet_5_has_activations_where_it_says(self, name, activation):
    images = jax.random.normal(jax.random.key(1), (2, *MNIST))
    theta, logits = evaluated(name, images)
    chex.assert_trees_all_close(
      logits, _lenet_5(theta, images, activation), rtol=1e-4, atol=1e-5
    )

  def test_lenet_5_small_is_three_convolutions_and_average_pools(self):
    images = jax.random.normal(jax.random.key(1), (2, *MNIST))
    theta, logits = evaluated('lenet_5_small', images)
    w = {name.split('/')[-1]: leaf['w'] for name, leaf in theta.items()}
    x = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for i in range(3):
      layer = {'w': w[f'conv_{i}'], 'b': jnp.zeros(1)}
      x = jax.nn.relu(_conv(layer, x))
      x = _patches(x).mean((2, 4)) if i < 2 else x.reshape(2, 120)
    expected = jax.nn.relu(x @ w['linear_0']) @ w['logits']
    chex.assert_trees_all_close(logits, expected, rtol=1e-4, atol=1e-5)

  @parameterized.named_parameters(
    ('wide_resnet', lambda: small_wrn()),
    ('alexnet_s', lambda: nets.make('alexnet_s', 3)),
  )
  def test_networks_with_norms_train_and_evaluate(self, make):
    net = make()
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3))
    theta, state = start(net, images)

    @jax.jit
    def step(theta, state, key):
      def loss_fn(theta):
        logits, after = net.apply(theta, state, key, images, True)
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 0]), (logits, after)

      grads, (logits, after) = jax.grad(loss_fn, has_aux=True)(theta)
      logits_after, evaluated = net.apply(theta, after, None, images, False)
      return grads, logits, after, logits_after, evaluated

    grads, logits, after, logits_after, evaluated = step(
      theta, state, jax.random.key(2)
    )
    chex.assert_tree_all_finite((grads, logits, logits_after))
    self.assertEqual(logits.shape, (2, 3))
    for leaf in trees.named_leaves(grads):
      self.assertTrue(jnp.any(leaf.value), leaf.path)
    chex.assert_trees_all_equal(after, evaluated)
    moved = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), state, after)
    self.assertTrue(all(jax.tree.leaves(moved)))

  def test_block_adds_its_convolutions_to_its_input(self):
    # With the second convolution of every block at zero, what is left is the
    # stem, the shortcuts and the norms.
    net = small_wrn(dropout=0.0)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    theta, state = start(net, images)
    for name in theta:
      if name.endswith('conv_1'):
        theta[name]['w'] = np.zeros_like(theta[name]['w'])
    logits, _ = jax.jit(net.apply, static_argnums=4)(
      theta, state, None, images, True
    )
    chex.assert_trees_all_close(
      logits, jax.jit(_shortcuts_only)(theta, images), rtol=1e-3, atol=1e-4
    )


def _conv(layer, x):
  bias = layer['b'].reshape(1, 1, 1, -1)
  return small.conv(x, layer['w'], padding='VALID') + bias


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


def _shortcuts_only(theta, x):
  """WRN-10-1 whose blocks hold nothing, in plain JAX, with norms at 1 and 0."""

  def norm_relu(x):
    mean = x.mean((0, 1, 2), keepdims=True)
    return jax.nn.relu(
      (x - mean) / jnp.sqrt(x.var((0, 1, 2), keepdims=True) + 1e-5)
    )

  x = small.conv(x, theta['wrn_10_1/stem']['w'])
  for group in (2, 3):
    shortcut = theta[f'wrn_10_1/group_{group}/block_0/shortcut']['w']
    x = small.conv(norm_relu(x), shortcut, 2)
  x = norm_relu(x).mean((1, 2))
  logits = theta['wrn_10_1/logits']
  return x @ logits['w'] + logits['b'].reshape(1, -1)


class DropoutTest(parameterized.TestCase):
  def test_same_key_gives_the_same_logits_and_evaluation_needs_none(self):
    net = small_wrn()
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    theta, state = start(net, images)

    apply = jax.jit(net.apply, static_argnums=4)
    (first, after), (again, _), (other, _) = (
      apply(theta, state, jax.random.key(key), images, True)
      for key in (3, 3, 4)
    )
    chex.assert_trees_all_equal(first, again)
    self.assertFalse(jnp.allclose(first, other))
    with_key, without = (
      apply(theta, after, key, images, False)[0]
      for key in (jax.random.key(3), None)
    )
    chex.assert_trees_all_equal(with_key, without)

  @parameterized.parameters('wrn_22_2', 'wrn_28_2', 'wrn_16_8')
  def test_training_without_a_key_is_refused(self, name):
    net = nets.make(name, 10)
    images = jax.ShapeDtypeStruct((2, *CIFAR), jnp.float32)
    apply = lambda theta, state, x: net.apply(theta, state, None, x, True)
    message = rf'{name}.* was given no key\. Call net\.apply\(theta, net_st'
    with self.assertRaisesRegex(ValueError, message):
      jax.eval_shape(apply, *shapes_of(name), images)

  def test_initial_weights_do_not_depend_on_dropout(self):
    def init(rate):
      drop = lambda x: layers.dropout(x, rate) if rate else x
      net = hk.transform(lambda x: hk.Linear(3)(drop(x)))
      return net.init(jax.random.key(0), jnp.ones((1, 4)))

    chex.assert_trees_all_equal(init(0.3), init(0.0))

  def test_share_dropped_is_the_rate_and_the_rest_is_scaled(self):
    drop = hk.transform(layers.dropout).apply
    for rate, dropped in ((0.3, 77), (0.999, 255), (0.001, 0)):
      y = drop({}, jax.random.key(0), jnp.ones((9, 1_111)), rate)
      self.assertAlmostEqual(float(jnp.mean(y == 0)), dropped / 256, delta=0.02)
      scale = 256 / (256 - dropped)
      chex.assert_trees_all_close(jnp.max(y), scale, rtol=1e-6)


class InitialiserTest(parameterized.TestCase):
  @parameterized.parameters('lenet_300_100', 'mlp', 'mnist_cnn', 'cifar_cnn')
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
  @parameterized.parameters(
    ('lenet300', 10, "network 'lenet300'.*mean 'lenet_.*There are: lenet_3"),
    ('xyz', 10, "network 'xyz'. There are"),
    ('mlp', 0, 'num_classes.*got 0'),
  )
  def test_what_cannot_be_made_is_refused(self, name, num_classes, message):
    with self.assertRaisesRegex(ValueError, message):
      nets.make(name, num_classes)

  @parameterized.parameters(*small.IMAGE_NETS)
  def test_images_of_wrong_rank_or_type_are_refused(self, name):
    net = nets.make(name, 10)
    key = jax.random.key(0)
    with self.assertRaisesRegex(ValueError, r'\[N, H, W, C\], got \(2, 784\)'):
      net.init(key, jnp.zeros((2, 784)), True)
    with self.assertRaisesRegex(ValueError, 'got uint8'):
      net.init(key, jnp.zeros((2, *CIFAR), jnp.uint8), True)

  @parameterized.parameters(
    (nets.ResNet, dict(depth=34), 'depth must be 8, 10, 18, 20 or 50, got 34'),
    (nets.ResNet, dict(stem='mnist'), "'imagenet' or 'cifar', got 'mnist'"),
    (nets.WideResNet, dict(depth=20, width=2), 'depth.*6n.*got 20'),
    (nets.WideResNet, dict(depth=4, width=2), 'depth.*got 4'),
    (nets.WideResNet, dict(depth=22, width=0), 'width.*got 0'),
    (
      *(nets.WideResNet, dict(depth=22, width=2, dropout=1.0)),
      r'dropout.*\[0, 1\), got 1.0',
    ),
    (nets.VGG, dict(variant='e'), "'like', 'c' or 'd', got 'e'"),
    (nets.FixUpResNet, dict(depth=5), 'depth.*6n.*got 5'),
    (nets.FixUpResNet, dict(depth=12), 'depth.*6n.*got 12'),
    (nets.FixUpResNet, dict(depth=20.5), 'depth.*6n.*got 20.5'),
  )
  def test_impossible_networks_are_refused(self, module, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      hk.transform(lambda: module(10, **settings)).init(None)
