"""Weights as their connections: supports, condensing and undoing it."""

from absl.testing import parameterized
import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from powerprop_jax import nets
from powerprop_jax.sparse import kernel_choice
from powerprop_jax.sparse import weight as sparse_weight


def _mask(shape, density):
  return np.random.default_rng(0).random(shape) < density


class SupportTest(parameterized.TestCase):
  def test_expand_undoes_condense(self):
    mask = _mask((5, 7), 0.3)
    theta = small.normal({'linear': {'w': (5, 7), 'b': (7,)}})
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

  def test_faster_supports_are_those_measured_to_be(self):
    masks = {
      'thin': {'w': _mask((512, 256), 0.01)},
      'full': {'w': _mask((256, 512), 0.99)},
      'tiny': {'w': _mask((512, 4), 0.5)},
    }
    found = sparse_weight.supports(masks)

    def make_net(supports):
      def forward(x):
        for name, leaves in masks.items():
          given = dict(support=supports[f'{name}/w'], name=name)
          x = nets.CondensedLinear(leaves['w'].shape[-1], **given)(x)
        return x

      return hk.transform_with_state(forward)

    x = jax.ShapeDtypeStruct((64, 512), jnp.float32)
    tasks = sparse_weight.products(found, make_net, x)
    assert set(tasks) == set(found)
    size = int(masks['tiny']['w'].sum())
    assert tasks['tiny/w'] == kernel_choice.Product(512, 4, size, 64)
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
