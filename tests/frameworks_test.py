"""One network in four libraries: the same masks, weights, costs and budgets."""

import functools
import json

import chex
import equinox as eqx
from flax import nnx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import processes
import programs
import pytest
from sklearn import datasets

import powerprop_jax as pp
from powerprop_jax.core import trees
from powerprop_jax.costs import summary
from powerprop_jax.export import export, exported, program
from powerprop_jax.export.exported import Exported
from powerprop_jax.jaxprs import moves, walk
from powerprop_jax.report import analysis, plotting
from powerprop_jax.sparse import kernel_choice, network

# Shapes as Haiku has them: [height, width, in, out] and [in, out].
SHAPES = {
  'mlp': [(64, 50), (50, 30), (30, 10)],
  'cnn': [(3, 3, 1, 8), (3, 3, 8, 8), (512, 10)],
}


def _start(kind):
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.normal(size=s) / np.sqrt(np.prod(s[:-1])), jnp.float32)
    for s in SHAPES[kind]
  ]


def _forward(kind, layers, x):
  """What the four have in common; x is [N, 64]."""
  if kind == 'cnn':
    x = x.reshape(-1, 8, 8, 1)
  for layer in layers[:-1]:
    x = jax.nn.relu(layer(x))
  return layers[-1](x.reshape(x.shape[0], -1))


def _haiku(kind):
  def forward(x):
    layers = [
      hk.Linear(s[-1], name=f'l{i}')
      if len(s) == 2
      else hk.Conv2D(s[-1], 3, name=f'l{i}')
      for i, s in enumerate(SHAPES[kind])
    ]
    return _forward(kind, layers, x)

  net = hk.without_apply_rng(hk.transform(forward))
  theta = {
    f'l{i}': {'w': w, 'b': jnp.zeros(w.shape[-1])}
    for i, w in enumerate(_start(kind))
  }
  return net.apply, theta


class _Linen(nn.Module):
  kind: str

  @nn.compact
  def __call__(self, x):
    layers = [
      nn.Dense(s[-1], name=f'l{i}')
      if len(s) == 2
      else nn.Conv(s[-1], (3, 3), name=f'l{i}')
      for i, s in enumerate(SHAPES[self.kind])
    ]
    return _forward(self.kind, layers, x)


def _linen(kind):
  theta = {
    f'l{i}': {'kernel': w, 'bias': jnp.zeros(w.shape[-1])}
    for i, w in enumerate(_start(kind))
  }
  return _Linen(kind).apply, {'params': theta}


class _Nnx(nnx.Module):
  def __init__(self, kind, rngs):
    self.kind = kind
    for i, (w, s) in enumerate(zip(_start(kind), SHAPES[kind], strict=True)):
      if len(s) == 2:
        layer = nnx.Linear(*s, rngs=rngs)
      else:
        layer = nnx.Conv(s[2], s[3], (3, 3), rngs=rngs)
      layer.kernel[...] = w
      setattr(self, f'l{i}', layer)

  def __call__(self, x):
    return _forward(self.kind, [self.l0, self.l1, self.l2], x)


def _nnx(kind):
  graph, theta = nnx.split(_Nnx(kind, nnx.Rngs(0)))
  return lambda theta, x: nnx.merge(graph, theta)(x), theta


def _channels_first(conv):
  """A convolution of Equinox, of images as the others have them."""

  def call(x):
    return jax.vmap(conv)(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)

  return call


def _equinox(kind):
  key, modules = jax.random.key(0), []
  for w in _start(kind):
    if w.ndim == 2:
      layer = eqx.nn.Linear(*w.shape, key=key)
      values = w.T, jnp.zeros_like(layer.bias)
    else:
      layer = eqx.nn.Conv2d(*w.shape[2:], 3, padding='SAME', key=key)
      values = w.transpose(3, 2, 0, 1), jnp.zeros_like(layer.bias)
    where = lambda layer: (layer.weight, layer.bias)
    modules.append(eqx.tree_at(where, layer, values))
  theta, rest = eqx.partition(modules, eqx.is_inexact_array)

  def fn(theta, x):
    layers = [
      jax.vmap(layer)
      if isinstance(layer, eqx.nn.Linear)
      else _channels_first(layer)
      for layer in eqx.combine(theta, rest)
    ]
    return _forward(kind, layers, x)

  return fn, theta


LIBRARIES = {
  'haiku': _haiku,
  'linen': _linen,
  'nnx': _nnx,
  'equinox': _equinox,
}
OTHERS = [name for name in LIBRARIES if name != 'haiku']


class _Network:
  """A network, and its weights as matrices, whatever their layout."""

  def __init__(self, library, kind):
    self.fn, self.theta = LIBRARIES[library](kind)
    self.axes = walk.leaf_axes(self.fn, self.theta, _digits()[0])

  def matrices(self, tree):
    leaves = trees.by_path(tree)
    return [moves.matrix(leaves[n], a) for n, a in sorted(self.axes.items())]

  def masks(self, matrices):
    """A tree of masks with these on the weights."""
    by_name = dict(zip(sorted(self.axes), matrices, strict=True))
    return trees.map_leaves(
      lambda leaf: (
        moves.from_matrix(
          by_name[leaf.path], self.axes[leaf.path], leaf.value.shape
        )
        if leaf.path in by_name
        else jnp.ones(leaf.value.shape, bool)
      ),
      self.theta,
    )


@functools.cache
def _digits():
  digits = datasets.load_digits()
  images = jnp.asarray(digits.data / 16, jnp.float32)
  return images, jnp.asarray(digits.target)


@functools.cache
def _trained(library, kind):
  """After 300 steps of RigL and powerprop at 90 %, in a loop of others."""
  net = _Network(library, kind)
  inner = optax.adam(0.01) if kind == 'mlp' else optax.sgd(0.03, momentum=0.9)
  powerprop = pp.powerprop(inner, 2.0)
  tx = pp.drop_in(pp.rigl(powerprop, 0.9, period=20, stop=225))
  # Each library would draw its first masks in its own order.
  rng, sparsities = np.random.default_rng(1), pp.erk(net.theta, 0.9)
  first = [
    rng.random(w.shape) >= sparsities[name]
    for name, w in zip(sorted(net.axes), net.matrices(net.theta), strict=True)
  ]
  state = pp.with_masks(tx.init(net.theta), net.masks(first))
  params = pp.effective_params(net.theta, state)

  @jax.jit
  def step(params, state, images, labels):
    def loss(params):
      logits = net.fn(params, images)
      return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      )

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  images, labels = _digits()
  for rows in np.random.default_rng(2).integers(0, 1500, (300, 100)):
    params, state = step(params, state, images[rows], labels[rows])
  masks = pp.current_masks(params, state)
  right = jnp.argmax(net.fn(params, images[1500:]), axis=1) == labels[1500:]
  return net.matrices(params), net.matrices(masks), float(right.mean())


@pytest.mark.parametrize('library', OTHERS)
@pytest.mark.parametrize('kind', SHAPES)
@pytest.mark.slow
def test_training_is_that_of_haiku(library, kind):
  params, masks, accuracy = _trained(library, kind)
  wanted, wanted_masks, wanted_accuracy = _trained('haiku', kind)
  chex.assert_trees_all_equal(masks, wanted_masks)
  chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-5)
  assert accuracy == wanted_accuracy > 0.8


@pytest.mark.parametrize('library', OTHERS)
@pytest.mark.parametrize('kind', SHAPES)
def test_costs_and_budgets_are_those_of_haiku(library, kind):
  def facts(library):
    net = _Network(library, kind)
    images = _digits()[0][:1]
    costs = pp.costs.function_costs(net.fn, net.theta, images)
    sparsities = pp.erk(net.theta, 0.9)
    counted = [
      (cost.kind, cost.weights, cost.biases, cost.outputs, cost.macs)
      for cost in costs
    ]
    flops = pp.costs.inference_flops(costs, sparsities)
    return counted, flops, [sparsities[name] for name in sorted(net.axes)]

  assert facts(library) == facts('haiku')


@pytest.mark.parametrize('library', LIBRARIES)
def test_it_runs_without_its_zeros(library):
  net = _Network(library, 'cnn')
  rng = np.random.default_rng(1)
  masks = net.masks(
    [rng.random(w.shape) < 0.3 for w in net.matrices(net.theta)]
  )
  images = _digits()[0][:4]
  run = network.without_zeros(
    net.fn, masks, net.theta, images, execution='condensed'
  )
  assert {leaf.held for leaf in run.leaves.values()} == {'condensed'}
  values = network.condense(net.theta, masks)
  with kernel_choice.use('native', 'loops'):
    found = jax.jit(run)(values, images)
  wanted = net.fn(network.expand(values, masks), images)
  chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5)


def _pruned(library, kind='cnn'):
  """A network of which a tenth of the weights is left."""
  fn, theta = LIBRARIES[library](kind)
  masks = pp.prune(theta, sparsity=0.9)
  theta = pp.apply_masks(theta, masks)
  return fn, Exported(theta, masks, {}, {'library': library})


# Reads the files of a folder with plain JAX and checks what they compute.
_PLAIN = """
import pathlib, sys
import jax
import jax.export
import numpy as np

for path in sorted(pathlib.Path(sys.argv[1]).glob('*_jax.npz')):
  with np.load(path) as file:
    theta = {n[6:]: file[n] for n in file if n.startswith('theta/')}
    program = jax.export.deserialize(bytearray(file['program']))
    condense, condensed = (
      jax.export.deserialize(bytearray(file[f'program/{name}']))
      for name in ('condense', 'condensed')
    )
  with np.load(path.with_suffix('.expected.npz')) as expected:
    images, logits = expected['images'], expected['logits']
  for found in (
    program.call(theta, images),
    condensed.call(condense.call(theta), images),
  ):
    np.testing.assert_allclose(found, logits, 1e-5, 1e-5)
  print(path.name)
assert not {'powerprop_jax', 'flax', 'equinox', 'haiku'} & set(sys.modules)
"""


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A folder with a program of each library, and what it computes."""
  folder = tmp_path_factory.mktemp('programs')
  images = _digits()[0][:4]
  for library in LIBRARIES:
    fn, given = _pruned(library)
    path = program.write(
      folder / f'{library}_jax.npz',
      fn,
      given,
      images,
      execution='condensed',
      platforms=('cpu',),
    )
    logits = fn(given.theta, images[:3])
    expected = path.with_suffix('.expected.npz')
    np.savez(expected, images=images[:3], logits=logits)
  return folder


@pytest.mark.slow
def test_plain_jax_runs_their_programs(written):
  shown = processes.run('-c', _PLAIN, written)
  assert shown.split() == [f'{name}_jax.npz' for name in sorted(LIBRARIES)]


@pytest.mark.parametrize('library', LIBRARIES)
def test_their_weights_come_back_from_the_program(library, written):
  _, given = _pruned(library)
  found = export.read(written / f'{library}_jax.npz')
  for tree, like in zip(found[:2], given[:2], strict=True):
    chex.assert_trees_all_equal(exported.restored(tree, like), like)
  assert found.about == {'library': library}


@pytest.mark.parametrize('library', LIBRARIES)
def test_their_programs_are_benched(library, written, tmp_path):
  path, table = written / f'{library}_jax.npz', tmp_path / 'table.json'
  args = ['--batches', 2, '--repeats', 1, '--out', table]
  assert programs.powerprop('bench', path, *args) == 0
  found = json.loads(table.read_text())
  assert found['model']['inputs'] == 'float32[batch, 64]'
  assert found['model']['sparsity'] == pytest.approx(0.9, abs=2e-3)
  forms = ['dense', 'masked', 'condensed']
  assert [row['form'] for row in found['rows']] == forms
  assert not found['missing']


@pytest.mark.parametrize('library', OTHERS)
def test_tables_and_figures_are_those_of_haiku(library):
  def facts(library):
    _, (theta, masks, _, _) = _pruned(library)
    counts = [
      (row['size'], row['kept'], round(row['norm'], 4))
      for row in summary.summary(theta, masks)
      if row['selected']
    ]
    histograms = analysis.weight_histograms({1.0: theta, 2.0: theta})
    plotting.weight_histograms(histograms)
    found = [h.counts.tolist() for h in histograms[2.0].values()]
    near = analysis.fraction_near_zero(theta, 0.1)
    overlap = analysis.mask_overlap(theta, theta, 0.9)
    return [
      counts,
      found,
      [row['near_zero'] for row in near],
      [row['density'] for row in overlap],
      float(pp.masks.density(masks, select=pp.is_weight)),
    ]

  assert facts(library) == facts('haiku')


def test_leaves_that_are_no_arrays_of_numbers_are_named(tmp_path):
  mlp = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
  keys = nnx.state(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
  for tree, message in (
    (mlp, "'activation' is custom_"),
    (keys, 'is key<fry>'),
  ):
    with pytest.raises(ValueError, match=message):
      pp.summary_table(tree)
    with pytest.raises(ValueError, match=message):
      export.write(tmp_path / 'x', Exported(tree, tree, {}, {}), format='npz')
