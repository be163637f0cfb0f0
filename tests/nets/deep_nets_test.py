"""VGG, residual networks and MobileNetV2: sizes, norms, strides, dropout."""

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

CIFAR = (32, 32, 3)
DEEP = (
  'vgg_like',
  'vgg_c',
  'vgg_d',
  'vgg_19',
  'wrn_22_2',
  'wrn_28_2',
  'wrn_16_8',
  'resnet_18',
  'resnet_50',
  'resnet_18_cifar',
  'resnet_50_cifar',
  'mobilenet_v2',
  'fixup_resnet_110',
)
PHOTOGRAPH = (224, 224, 3)


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
  def test_registry_holds_the_networks_tested_here(self):
    self.assertContainsSubset(DEEP, nets.NAMES)

  @parameterized.parameters(
    # Weights of SNFS's and RigL's networks; the papers count 1.5 and 11.0
    # million parameters for WRN-28-2 and WRN-16-8, 25.6 for ResNet-50. The
    # others have the parameters of the well-known PyTorch networks.
    ('vgg_like', CIFAR, 10, 14_977_728, 14_991_946),
    ('vgg_c', CIFAR, 10, 11_307_712, 11_323_466),
    ('vgg_d', CIFAR, 10, 15_239_872, 15_255_626),
    ('wrn_22_2', CIFAR, 10, 1_076_912, 1_079_642),
    ('wrn_28_2', CIFAR, 10, 1_463_984, 1_467_610),
    ('wrn_16_8', CIFAR, 10, 10_954_160, 10_961_370),
    ('vgg_19', CIFAR, 10, 20_024_000, 20_035_018),
    ('resnet_18', PHOTOGRAPH, 1000, 11_678_912, 11_689_512),
    ('resnet_50', PHOTOGRAPH, 1000, 25_502_912, 25_557_032),
    ('resnet_18_cifar', CIFAR, 10, 11_164_352, 11_173_962),
    ('resnet_50_cifar', CIFAR, 10, 23_467_712, 23_520_842),
    ('mobilenet_v2', CIFAR, 10, 2_202_560, 2_236_682),
    ('mobilenet_v2', CIFAR, 1000, 3_469_760, 3_504_872),
    ('fixup_resnet_110', CIFAR, 10, 1_719_856, 1_720_138),
  )
  def test_counts_are_those_of_the_literature(
    self, name, image_shape, num_classes, num_weights, num_parameters
  ):
    theta, _ = shapes_of(name, image_shape, num_classes)
    leaves = list(trees.named_leaves(theta))
    weights = [leaf for leaf in leaves if select_lib.is_weight(*leaf)]
    self.assertEqual(sum(leaf.value.size for leaf in weights), num_weights)
    self.assertEqual(sum(leaf.value.size for leaf in leaves), num_parameters)

  @parameterized.parameters(
    ('vgg_like', 15), ('vgg_c', 16), ('vgg_d', 16), ('wrn_22_2', 23),
    ('wrn_28_2', 29), ('wrn_16_8', 17), ('resnet_50', 54), ('vgg_19', 17),
    ('resnet_18', 21), ('resnet_18_cifar', 21), ('resnet_50_cifar', 54),
    ('mobilenet_v2', 53), ('fixup_resnet_110', 110),
  )  # fmt: skip
  def test_weights_are_selected_and_norms_are_not(self, name, num_layers):
    theta, _ = shapes_of(name)
    chosen = select_lib.selected_names(select_lib.is_weight, theta)
    self.assertLen(chosen, num_layers)
    self.assertIn(f'{name}/logits/w', chosen)

  def test_some_networks_have_a_bias_in_the_output_layer_alone(self):
    names = ('wrn_22_2', 'resnet_18', 'resnet_50', 'vgg_19', 'mobilenet_v2')
    for name in names:
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
  @parameterized.product(name=DEEP, image_shape=[(8, 8, 1), (33, 40, 3)])
  def test_every_net_takes_small_and_odd_images(self, name, image_shape):
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


class ErrorTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(depth=34), 'depth must be 10, 18 or 50, got 34'),
    (dict(stem='mnist'), "'imagenet' or 'cifar', got 'mnist'"),
  )
  def test_unknown_resnets_are_refused(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      hk.transform(lambda: nets.ResNet(10, **settings)).init(None)

  @parameterized.parameters(
    (dict(depth=20, width=2), 'depth.*6n.*got 20'),
    (dict(depth=4, width=2), 'depth.*got 4'),
    (dict(depth=22, width=0), 'width.*got 0'),
    (dict(depth=22, width=2, dropout=1.0), r'dropout.*\[0, 1\), got 1.0'),
  )
  def test_impossible_wide_resnets_are_refused(self, settings, message):
    with self.assertRaisesRegex(ValueError, message):
      hk.transform(lambda: nets.WideResNet(10, **settings)).init(None)

  def test_unknown_variant_of_vgg_is_refused(self):
    with self.assertRaisesRegex(ValueError, "'like', 'c' or 'd', got 'e'"):
      hk.transform(lambda: nets.VGG(10, 'e')).init(None)

  def test_vgg_c_says_how_small_an_image_can_be(self):
    theta, _ = shapes_of('vgg_c', (4, 4, 3))
    self.assertEqual(theta['vgg_c/linear_0']['w'].shape, (512, 512))
    with self.assertRaisesRegex(ValueError, 'at least 4×4, got 3×8'):
      shapes_of('vgg_c', (3, 8, 3))
