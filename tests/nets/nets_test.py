"""Networks: their sizes in the literature, what they compute and refuse."""

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax import nets
from powerprop_jax.core import select as select_lib
from powerprop_jax.core import trees
from powerprop_jax.nets import layers

MNIST, CIFAR, DIGITS = (28, 28, 1), (32, 32, 3), (8, 8, 1)
PHOTOGRAPH = (224, 224, 3)
# The others have norms, whose statistics are their state.
STATELESS = (
  *('lenet_300_100', 'lenet_5', 'lenet_5_relu', 'lenet_5_small'),
  *('mlp', 'mnist_cnn', 'cifar_cnn', 'fixup_resnet_110'),
)


def shapes_of(name, image_shape=CIFAR, num_classes=10):
  """Parameters and state as shapes, without computing anything."""
  net = nets.make(name, num_classes)
  images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
  init = lambda key, x: net.init(key, x, True)
  return jax.eval_shape(init, jax.random.key(0), images)


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
  def forward(images, is_training):
    return nets.WideResNet(3, depth=10, width=1, dropout=dropout)(
      images, is_training
    )

  return hk.transform_with_state(forward)


def start(net, images):
  """Weights in NumPy and a state of zeros: compiling init takes seconds."""
  theta, state = jax.eval_shape(
    lambda key, x: net.init(key, x, True), jax.random.key(0), images
  )
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

  def test_layers_of_lenet_5_small_have_the_published_sizes(self):
    theta, _ = shapes_of('lenet_5_small', CIFAR)
    sizes = [leaf.value.size for leaf in trees.named_leaves(theta)]
    self.assertEqual(sizes, [450, 2400, 48_000, 9840, 820])

  @parameterized.parameters(
    *('wrn_22_2', 'resnet_18', 'resnet_50', 'vgg_19', 'mobilenet_v2')
  )
  def test_bias_is_in_the_output_layer_alone(self, name):
    theta, _ = shapes_of(name)
    biases = [n.path for n in trees.named_leaves(theta) if n.name == 'b']
    self.assertEqual(biases, [f'{name}/logits/b'])

  def test_layers_are_called_by_group_and_block(self):
    theta, _ = shapes_of('wrn_22_2')
    for module, shape in (
      ('stem', (3, 3, 3, 16)),
      ('group_1/block_0/conv_0', (3, 3, 16, 32)),
      ('group_1/block_0/shortcut', (1, 1, 16, 32)),
      ('group_3/block_2/conv_1', (3, 3, 128, 128)),
    ):
      self.assertEqual(theta[f'wrn_22_2/{module}']['w'].shape, shape)
    self.assertNotIn('wrn_22_2/group_1/block_1/shortcut', theta)


class ForwardTest(parameterized.TestCase):
  @parameterized.product(
    name=nets.NAMES, image_shape=[DIGITS, MNIST, (33, 40, 3)]
  )
  def test_every_net_takes_small_and_odd_images(self, name, image_shape):
    if name in ('lenet_5', 'lenet_5_relu') and image_shape == DIGITS:
      with self.assertRaisesRegex(ValueError, 'at least 16×16, got 8×8'):
        shapes_of(name, image_shape)
      return
    net = nets.make(name, 7)
    theta, state = shapes_of(name, image_shape, 7)
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    for is_training in (True, False):

      def apply(theta, state, key, images, is_training=is_training):
        return net.apply(theta, state, key, images, is_training)

      logits, after = jax.eval_shape(
        apply, theta, state, jax.random.key(0), images
      )
      self.assertEqual(logits.shape, (2, 7))
      chex.assert_trees_all_equal_shapes_and_dtypes(after, state)

  @parameterized.parameters('lenet_300_100', 'mlp', 'mnist_cnn', 'cifar_cnn')
  def test_logits_start_finite_and_of_order_one(self, name):
    images = jax.random.uniform(jax.random.key(1), (16, *DIGITS))
    _, logits = evaluated(name, images)
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

  def test_strides_of_resnet_50_are_in_the_3x3_convolutions(self):
    shapes = outputs_of('resnet_50', PHOTOGRAPH)
    self.assertEqual(shapes['stem'], (2, 112, 112, 64))
    for group, size in ((1, 56), (2, 28), (3, 14), (4, 7)):
      block = f'group_{group}/block_0'
      before = 56 if group == 1 else 2 * size
      self.assertEqual(shapes[f'{block}/conv_0'][1], before)
      self.assertEqual(shapes[f'{block}/conv_1'][1], size)
      self.assertEqual(shapes[f'{block}/shortcut'][1], size)

  def test_blocks_of_resnet_18_stride_first_and_project_when_they_widen(self):
    for name, shape in (('resnet_18', PHOTOGRAPH), ('resnet_18_cifar', CIFAR)):
      shapes = outputs_of(name, shape)
      stem = 112 if name == 'resnet_18' else 32
      self.assertEqual(shapes['stem'], (2, stem, stem, 64))
      size = 56 if name == 'resnet_18' else 32
      for group, channels in ((1, 64), (2, 128), (3, 256), (4, 512)):
        block = f'group_{group}/block_0'
        for layer in ('conv_0', 'conv_1'):
          expected = (2, size, size, channels)
          self.assertEqual(shapes[f'{block}/{layer}'], expected)
        self.assertEqual(f'{block}/shortcut' in shapes, group > 1)
        size //= 2

  def test_mobilenet_filters_channels_apart_and_strides_three_times(self):
    theta, _ = shapes_of('mobilenet_v2')
    shapes = outputs_of('mobilenet_v2', CIFAR)
    inside = theta['mobilenet_v2/group_3/block_0/depthwise']['w'].shape
    self.assertEqual(inside, (3, 3, 1, 6 * 24))
    self.assertNotIn('group_1/block_0/expand', shapes)
    sizes = [shapes[f'group_{i}/block_0/depthwise'][1] for i in range(1, 8)]
    self.assertEqual(sizes, [32, 32, 16, 8, 8, 4, 4])
    self.assertEqual(shapes['head'], (2, 4, 4, 1280))

  def test_wide_resnet_trains_and_evaluates(self):
    net = small_wrn()
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
    for before, now in zip(
      jax.tree.leaves(state), jax.tree.leaves(after), strict=True
    ):
      self.assertFalse(jnp.array_equal(before, now))

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


def _shortcuts_only(theta, x):
  """WRN-10-1 whose blocks hold nothing, in plain JAX, with norms at 1 and 0."""

  def conv(name, x, stride):
    return jax.lax.conv_general_dilated(
      x,
      theta[f'wrn_10_1/{name}']['w'],
      (stride, stride),
      'SAME',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )

  def norm_relu(x):
    mean = x.mean((0, 1, 2), keepdims=True)
    return jax.nn.relu(
      (x - mean) / jnp.sqrt(x.var((0, 1, 2), keepdims=True) + 1e-5)
    )

  x = conv('stem', x, 1)
  x = conv('group_2/block_0/shortcut', norm_relu(x), 2)
  x = conv('group_3/block_0/shortcut', norm_relu(x), 2)
  x = norm_relu(x).mean((1, 2))
  logits = theta['wrn_10_1/logits']
  return x @ logits['w'] + logits['b'].reshape(1, -1)


class DropoutTest(parameterized.TestCase):
  def test_same_key_gives_the_same_logits_and_evaluation_needs_none(self):
    net = small_wrn()
    images = jax.random.uniform(jax.random.key(1), (2, 8, 8, 3))
    theta, state = start(net, images)

    @jax.jit
    def train(key):
      return net.apply(theta, state, key, images, True)

    @jax.jit
    def evaluate(state):
      logits = net.apply(theta, state, None, images, False)[0]
      key = jax.random.key(3)
      return logits, net.apply(theta, state, key, images, False)[0]

    (first, after), (again, _), (other, _) = (
      train(jax.random.key(key)) for key in (3, 3, 4)
    )
    chex.assert_trees_all_equal(first, again)
    self.assertFalse(jnp.allclose(first, other))
    chex.assert_trees_all_equal(*evaluate(after))

  @parameterized.parameters('wrn_22_2', 'wrn_28_2', 'wrn_16_8')
  def test_training_without_a_key_is_refused(self, name):
    net = nets.make(name, 10)
    theta, state = shapes_of(name)
    images = jax.ShapeDtypeStruct((2, *CIFAR), jnp.float32)
    with self.assertRaisesRegex(
      ValueError, rf'{name}.* was given no key\. Call net\.apply\(theta, net_st'
    ):
      jax.eval_shape(
        lambda theta, state, x: net.apply(theta, state, None, x, True),
        theta,
        state,
        images,
      )

  def test_initial_weights_do_not_depend_on_dropout(self):
    x = jnp.ones((1, 4))
    with_dropout = hk.transform(
      lambda x: hk.Linear(3)(layers.dropout(x, 0.3))
    ).init(jax.random.key(0), x)
    without = hk.transform(lambda x: hk.Linear(3)(x)).init(jax.random.key(0), x)
    chex.assert_trees_all_equal(with_dropout, without)

  def test_share_dropped_is_the_rate_and_the_rest_is_scaled(self):
    dropped = hk.transform(lambda x: layers.dropout(x, 0.3)).apply(
      {}, jax.random.key(0), jnp.ones(10_000)
    )
    self.assertAlmostEqual(float(jnp.mean(dropped == 0)), 0.3, delta=0.02)
    chex.assert_trees_all_close(
      jnp.unique(dropped), jnp.array([0.0, 1 / 0.7]), rtol=1e-6
    )


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
  @parameterized.parameters(
    ('lenet300', 10, "network 'lenet300'.*mean 'lenet_.*There are: lenet_3"),
    ('xyz', 10, "network 'xyz'. There are"),
    ('mlp', 0, 'num_classes.*got 0'),
  )
  def test_what_cannot_be_made_is_refused(self, name, num_classes, message):
    with self.assertRaisesRegex(ValueError, message):
      nets.make(name, num_classes)

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

  @parameterized.parameters(
    (nets.ResNet, dict(depth=34), 'depth must be 10, 18 or 50, got 34'),
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

  def test_vgg_c_says_how_small_an_image_can_be(self):
    theta, _ = shapes_of('vgg_c', (4, 4, 3))
    self.assertEqual(theta['vgg_c/linear_0']['w'].shape, (512, 512))
    with self.assertRaisesRegex(ValueError, 'at least 4×4, got 3×8'):
      shapes_of('vgg_c', (3, 8, 3))
