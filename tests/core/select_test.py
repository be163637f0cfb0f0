"""Which leaves are chosen, and how people are told."""

from absl.testing import absltest
import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.core import select, trees


def _params():
  def forward(x):
    x = hk.Embed(5, 4, name='embed')(x)
    x = hk.Linear(3, name='linear')(x)
    return hk.LayerNorm(-1, True, True, name='norm')(x)

  net = hk.without_apply_rng(hk.transform(forward))
  return net.init(jax.random.key(0), jnp.zeros((2,), jnp.int32))


class SelectTest(absltest.TestCase):
  def test_default_is_the_weights_of_layers(self):
    names = select.selected_names(select.is_weight, _params())
    self.assertEqual(names, ('linear/w',))

  def test_kernels_are_weights_but_not_integers_and_vectors(self):
    for rank in range(6):
      is_weight = select.is_weight('conv', 'w', jnp.zeros((2,) * rank))
      self.assertEqual(is_weight, rank >= 2)
    self.assertFalse(select.is_weight('m', 'w', jnp.zeros((2, 2), jnp.int32)))

  def test_others_take_part_when_asked_by_any_predicate(self):
    named = select.by_regex('embeddings$', r'^linear/b$')
    names = select.selected_names(named, _params())
    self.assertEqual(names, ('embed/embeddings', 'linear/b'))
    large = lambda module_name, name, value: value.size > 12
    names = select.selected_names(large, _params())
    self.assertEqual(names, ('embed/embeddings',))

  def test_selecting_nothing_lists_the_leaves(self):
    with self.assertRaisesRegex(ValueError, 'linear/w.*norm/offset'):
      select.selected_names(select.by_regex('kernel$'), _params())

  def test_a_tree_without_leaves_selects_nothing_quietly(self):
    self.assertEqual(select.selected_names(select.is_weight, {}), ())

  def test_bad_patterns(self):
    with self.assertRaisesRegex(ValueError, "'\\(' is not a regular"):
      select.by_regex('(')
    with self.assertRaisesRegex(ValueError, 'at least one pattern'):
      select.by_regex()
    for given in (('conv_0',), (select.is_weight,), ('conv', 'logits')):
      with self.assertRaisesRegex(ValueError, 'exclude takes what it leaves'):
        select.exclude(*given)

  def test_names_of_deep_and_shallow_trees(self):
    tree = {'top': 1, 'a': {'b': {'c': 2}}, 'list': [3]}
    paths = [leaf.path for leaf in trees.named_leaves(tree)]
    self.assertEqual(paths, ['a/b/c', 'list/0', 'top'])
