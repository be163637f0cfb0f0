from absl.testing import parameterized
import jax
from jax import lax
import jax.numpy as jnp

from powerprop_jax.jaxprs import walk
from powerprop_jax.jaxprs.walk import Product
from powerprop_jax.sparse import plain_convolution

_X = jnp.ones((2, 3))
_W = jnp.ones((3, 3))
_PRODUCT = Product('w', 'linear', 18, 6, 3)  # _X @ _W


def _find(fn, theta, x=_X):
  """Products of fn(theta, x), theta a dict of parameters, x the data."""
  closed = jax.make_jaxpr(fn)(theta, x)
  origins = [frozenset({name}) for name in sorted(theta)]
  origins += [None] * len(jax.tree.leaves(x))
  sizes = {name: value.size for name, value in theta.items()}
  found = walk.find_products(closed, origins, sizes)
  return [Product(*product[:5]) for product in found]


def _conv(x, w, **kwargs):
  kwargs = {'window_strides': (1, 1), 'padding': 'VALID'} | kwargs
  return lax.conv_general_dilated(
    x, w, dimension_numbers=('NHWC', 'HWIO', 'NHWC'), **kwargs
  )


@jax.custom_jvp
def _own_jvp(x, w):
  return x @ w


_own_jvp.defjvp(
  lambda primals, tangents: (_own_jvp(*primals), tangents[0] @ primals[1])
)


class ProductsTest(parameterized.TestCase):
  @parameterized.parameters(
    ({}, (3, 3, 4, 6), 'conv'),
    ({'window_strides': (2, 3)}, (3, 2, 4, 6), 'conv'),
    ({'rhs_dilation': (2, 2)}, (2, 3, 4, 6), 'conv'),
    ({'feature_group_count': 2}, (3, 3, 2, 6), 'conv'),
    ({'feature_group_count': 4}, (3, 3, 1, 8), 'depthwise'),
    (
      {'lhs_dilation': (2, 2), 'padding': ((2, 2), (2, 2))},
      (3, 3, 4, 6),
      'conv',
    ),
  )
  def test_ones_through_a_kernel_of_ones_add_up_to_the_multiply_adds(
    self, kwargs, shape, kind
  ):
    x, w = jnp.ones((2, 7, 9, 4)), jnp.ones(shape)
    y = _conv(x, w, **kwargs)
    (found,) = _find(lambda t, x: _conv(x, t['w'], **kwargs), {'w': w}, x)
    self.assertEqual(found.kind, kind)
    self.assertEqual(found.macs, int(y.sum()))
    self.assertEqual(found.outputs, y.size)
    self.assertEqual(found.fan_in, w.size // shape[-1])

  @parameterized.parameters(
    ('ij,jk->ik', (2, 3), (3, 4)),
    ('tij,jk->tik', (5, 2, 3), (3, 4)),
    ('ij,kj->ki', (2, 3), (4, 3)),
    ('ihj,hjk->ihk', (2, 6, 3), (6, 3, 4)),
    ('ihj,hjk->ik', (2, 6, 3), (6, 3, 4)),
  )
  def test_ones_through_a_matrix_of_ones_add_up_likewise(self, rule, x, w):
    x, w = jnp.ones(x), jnp.ones(w)
    y = jnp.einsum(rule, x, w)
    found = _find(lambda t, x: jnp.einsum(rule, x, t['w']), {'w': w}, x)
    self.assertLen(found, 1)
    self.assertEqual(found[0].leaf, 'w')
    self.assertEqual(found[0].macs, int(y.sum()))
    self.assertEqual(found[0].outputs, y.size)

  @parameterized.named_parameters(
    ('transpose', lambda w: w.T),
    ('reshape', lambda w: w.reshape(1, 9).reshape(3, 3)),
    ('mask', lambda w: jnp.where(jnp.eye(3, dtype=bool), w, 0)),
    ('half_precision', lambda w: w.astype(jnp.bfloat16).astype(jnp.float32)),
    ('own_statistics', lambda w: (w - w.mean()) / w.std()),
    ('jit', jax.jit(jnp.tanh)),
    ('checkpoint', jax.checkpoint(jnp.tanh)),
  )
  def test_a_weight_is_known_after(self, change):
    found = _find(lambda t, x: x @ change(t['w']), {'w': _W})
    self.assertEqual(found, [_PRODUCT])

  @parameterized.named_parameters(
    ('jit', jax.jit(jnp.matmul)),
    ('checkpoint', jax.checkpoint(jnp.matmul)),
    ('custom_jvp', _own_jvp),
    ('vmap', jax.vmap(jnp.matmul, in_axes=(0, None))),
  )
  def test_products_are_found_inside(self, product):
    found = _find(lambda t, x: product(x, t['w']), {'w': _W})
    self.assertEqual(found, [_PRODUCT])

  def test_a_convolution_with_a_custom_vjp_counts_once(self):
    window = plain_convolution.Window(3, 3, 1, ((1, 1), (1, 1)))
    convolve = lambda t, x: plain_convolution.convolve(x, t['w'], window)
    found = _find(
      convolve, {'w': jnp.ones((3, 3, 2, 4))}, jnp.ones((1, 5, 5, 2))
    )
    self.assertEqual(found, [Product('w', 'conv', 1800, 100, 18)])

  @parameterized.named_parameters(
    # The larger one of a kernel and its scale.
    ('scale', lambda t, x: x @ (t['w'] * t['s'][None]), [_PRODUCT]),
    (
      *('activations', lambda t, x: (x @ t['w']) @ x.T),
      [_PRODUCT, Product(None, 'activations', 12, 4, 3)],
    ),
    (
      *('constants', lambda t, x: (x @ jnp.ones((3, 3))) * t['s'][None]),
      [Product(None, 'activations', 18, 6, 3)],
    ),
    ('without_data', lambda t, x: x + (t['w'] @ t['w']).sum(), []),
  )
  def test_a_leaf_is_a_weight_that_meets_data(self, fn, expected):
    self.assertEqual(_find(fn, {'w': _W, 's': jnp.ones(3)}), expected)

  def test_turns_of_a_scan_add_up(self):
    def recurrent(t, xs):
      # The state starts as a constant and depends on the data after one turn.
      step = lambda h, x: (jnp.tanh(h @ t['w'] + x), None)
      return lax.scan(step, jnp.zeros((2, 3)), xs)[0]

    found = _find(recurrent, {'w': _W}, jnp.ones((5, 2, 3)))
    self.assertEqual(found, [Product('w', 'linear', 5 * 18, 5 * 6, 3)])

  def test_origins_pass_through_the_carry_of_a_scan(self):
    def shifted(t, x):
      # The data need three turns to reach the last place.
      turn = lambda carry, _: ((x, *carry[:-1]), None)
      start = (jnp.zeros((2, 3)),) * 3
      last = lax.scan(turn, start, length=4)[0][-1]
      return last @ t['w']

    self.assertEqual(_find(shifted, {'w': _W}), [_PRODUCT])

  def test_stacked_layers_are_one_leaf(self):
    layers = lambda t, x: lax.scan(lambda h, w: (h @ w, None), x, t['w'])[0]
    found = _find(layers, {'w': jnp.ones((4, 3, 3))})
    self.assertEqual(found, [Product('w', 'linear', 4 * 18, 4 * 6, 3)])

  def test_the_costliest_branch_counts(self):
    def branches(t, x):
      twice = lambda x: x @ t['w'] @ t['w']
      once = lambda x: x @ t['w']
      return lax.switch(x.sum().astype(int), [once, twice, lambda x: x], x)

    found = _find(branches, {'w': _W})
    self.assertEqual(sum(product.macs for product in found), 36)

  def test_only_a_product_in_a_while_loop_is_refused(self):
    def loop(turn, x):
      return lax.while_loop(lambda x: x.sum() < 9, turn, x)

    with self.assertRaisesRegex(ValueError, 'with w inside a while loop'):
      _find(lambda t, x: loop(lambda x: x @ t['w'], x), {'w': _W})
    doubled = lambda t, x: loop(lambda x: 2 * x, x) @ t['w']
    self.assertEqual(_find(doubled, {'w': _W}), [_PRODUCT])
