"""FixUp residual networks: what they start as, and what a block computes."""

import math

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import small

from powerprop_jax import nets
from powerprop_jax.core import trees
from powerprop_jax.jaxprs import dct
from powerprop_jax.nets import fixup
from powerprop_jax.nets.layers import forms

PLAIN = forms.Form()


def small_fixup(form=PLAIN):
  """FixUp-ResNet-8, one block in a group."""

  def forward(images):
    with forms.use(form):
      return nets.FixUpResNet(5, depth=8)(images)

  return hk.without_apply_rng(hk.transform(forward))


def images(size=8):
  return jax.random.normal(jax.random.key(1), (2, size, size, 3))


def start(net, images):
  return jax.jit(net.init)(jax.random.key(0), images)


def _oracle(theta, x):
  """The network once more, in plain JAX."""
  theta = {n.removeprefix('fixup_resnet_8'): leaf for n, leaf in theta.items()}
  x = jax.nn.relu(small.conv(x, theta['/stem']['w']) + theta['']['bias_0'])
  for group in (1, 2, 3):
    block = f'/group_{group}/block_0'
    scalars, stride = theta[block], min(group, 2)
    shifted = x + scalars['bias_0']
    y = small.conv(shifted, theta[f'{block}/conv_0']['w'], stride)
    y = jax.nn.relu(y + scalars['bias_1']) + scalars['bias_2']
    y = small.conv(y, theta[f'{block}/conv_1']['w'])
    y = y * scalars['scale'] + scalars['bias_3']
    if group > 1:
      kept = shifted[:, ::2, ::2]
      x = jnp.concatenate([kept, jnp.zeros_like(kept)], axis=3)
    x = jax.nn.relu(x + y)
  logits = theta['/logits']
  x = x.mean((1, 2)) + theta['']['bias_1']
  return x @ logits['w'] + logits['b'].reshape(1, -1)


class FixUpTest(parameterized.TestCase):
  def test_computes_what_the_paper_says(self):
    net, x = small_fixup(), images(9)
    theta = start(net, x)
    theta = jax.tree.map(lambda leaf: 0.2 * leaf, small.grads(0, theta))
    chex.assert_trees_all_close(
      jax.jit(net.apply)(theta, x), jax.jit(_oracle)(theta, x), rtol=1e-4
    )

  def test_starts_with_blocks_that_do_nothing_and_logits_of_zero(self):
    net, x = small_fixup(), images()
    theta = start(net, x)
    np.testing.assert_array_equal(net.apply(theta, x), 0)
    for leaf in trees.named_leaves(theta):
      if leaf.name.startswith('bias') or leaf.path.endswith('conv_1/w'):
        np.testing.assert_array_equal(leaf.value, 0)
      elif leaf.name == 'scale':
        self.assertEqual(leaf.value, 1)
      elif leaf.path.endswith('conv_0/w'):
        # Smaller by the root of the depth, of three blocks.
        std = math.sqrt(2 / (9 * leaf.value.shape[-1])) / math.sqrt(3)
        self.assertAlmostEqual(float(leaf.value.std()), std, delta=0.05 * std)

  def test_a_given_initialiser_is_used_for_every_weight(self):
    w_init = hk.initializers.Constant(0.5)
    theta = start(small_fixup(forms.Form(w_init=w_init)), images())
    for leaf in trees.named_leaves(theta):
      if leaf.name == 'w':
        np.testing.assert_array_equal(leaf.value, 0.5)


class TransformScaleTest(parameterized.TestCase):
  @parameterized.parameters((16, 16), (16, 32), (64, 64))
  def test_is_the_root_of_the_ratio_of_norms(self, in_channels, out_channels):
    num_inputs = 9 * in_channels
    # Norms of weights drawn by FixUp's rule, and those of the transform.
    rng = np.random.default_rng(0)
    std = math.sqrt(2 / (9 * out_channels * 54))
    drawn = std * rng.normal(size=(num_inputs, 20_000))
    target = np.linalg.norm(drawn, axis=0).mean()
    rows = dct.cosine_weight(num_inputs, out_channels, jnp.float32)
    actual = np.linalg.norm(rows, axis=0).mean()
    self.assertAlmostEqual(
      fixup.transform_scale(3, in_channels, out_channels, 54),
      math.sqrt(target / actual),
      delta=1e-3,
    )

  def test_scales_start_where_the_weights_do_not(self):
    net, x = small_fixup(forms.Form(has_transform=True)), images()
    theta = start(net, x)
    expected = {'stem': 1.0, 'conv_1': 0.0, 'logits': 0.0}
    for leaf in trees.named_leaves(theta):
      if leaf.name == 'w':
        np.testing.assert_array_equal(leaf.value, 0)
      if leaf.name == 'transform_scale':
        layer = leaf.path.split('/')[-2]
        if layer == 'conv_0':
          self.assertBetween(float(leaf.value), 0.3, 2.0)
        else:
          self.assertEqual(leaf.value, expected[layer])
    np.testing.assert_array_equal(net.apply(theta, x), 0)
