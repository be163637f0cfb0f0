"""Half precision computes in bfloat16, and stores and sums up in float32."""

import functools

import chex
import haiku as hk
import jax
from jax.extend import core as jax_core
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.imagenet_resnet50 import setup
from experiments.imagenet_resnet50.config import NetConfig
from powerprop_jax.nets import resnet
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import precision

CONVOLUTION = 'conv_general_dilated'
SMALL = {'depth': 10, 'width': 1 / 16}
FULL = setup.make_net(NetConfig(**SMALL), 10)
HALF = setup.make_net(NetConfig(**SMALL, half='bfloat16'), 10)
REMAT = setup.make_net(NetConfig(**SMALL, remat=True), 10)
IMAGES = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)


def loss(net, theta, net_state, images):
  logits, net_state = net.apply(theta, net_state, None, images, True)
  return jnp.mean(jnp.square(logits)), (logits, net_state)


@functools.cache
def initial(net):
  return jax.jit(lambda key: net.init(key, IMAGES, True))(jax.random.key(0))


@functools.cache
def result(net):
  """Gradients, logits and state of the network."""
  compute = jax.jit(jax.grad(functools.partial(loss, net), has_aux=True))
  return compute(*initial(FULL), IMAGES)


def equations(jaxpr):
  """All equations of a program, those of inner ones too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, 'jaxpr', value)
      if isinstance(inner, jax_core.Jaxpr):
        yield from equations(inner)


@functools.cache
def program(net):
  """All equations of a training step."""
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), IMAGES, True))
  jaxpr = jax.make_jaxpr(functools.partial(loss, net))(*shapes, IMAGES).jaxpr
  return list(equations(jaxpr))


def kinds_of_convolutions(net):
  found = [e for e in program(net) if e.primitive.name == CONVOLUTION]
  return {v.aval.dtype for e in found for v in e.invars}


@pytest.mark.slow
def test_what_is_stored_is_float32():
  grads, (logits, net_state) = result(HALF)
  for tree in (initial(HALF), grads, logits, net_state):
    numbers = [x for x in jax.tree.leaves(tree) if x.dtype != jnp.int32]
    assert numbers and {x.dtype for x in numbers} == {jnp.dtype('float32')}
  chex.assert_trees_all_equal(initial(HALF), initial(FULL))


def test_every_convolution_is_in_half_precision_and_statistics_are_not():
  assert kinds_of_convolutions(HALF) == {jnp.dtype('bfloat16')}
  sums = [e for e in program(HALF) if e.primitive.name == 'reduce_sum']
  # Two for each of the 12 norms, at least.
  of_norms = [e for e in sums if e.params['axes'] == (0, 1, 2)]
  assert len(of_norms) >= 24
  assert {e.invars[0].aval.dtype for e in of_norms} == {jnp.dtype('float32')}


@pytest.mark.slow
def test_numbers_are_near_those_of_full_precision():
  (_, (ours, our_state)), (_, (theirs, their_state)) = map(result, (HALF, FULL))
  assert float(jnp.max(jnp.abs(ours - theirs))) > 0
  scale = float(jnp.std(theirs))
  np.testing.assert_allclose(ours, theirs, atol=0.15 * scale)
  average = lambda state: state['resnet_10/stem_norm/~/var_ema']['average']
  np.testing.assert_allclose(
    average(our_state), average(their_state), rtol=0.01
  )


def test_policies_do_not_outlive_a_call():
  result(HALF)
  for module in (resnet.ResNet, hk.BatchNorm):
    assert hk.mixed_precision.get_policy(module) is None
  assert kinds_of_convolutions(FULL) == {jnp.dtype('float32')}


@pytest.mark.slow
def test_recomputed_activations_give_the_same_numbers():
  names = {e.primitive.name for e in program(REMAT)}
  assert names & {'checkpoint', 'remat2', 'remat'}
  chex.assert_trees_all_equal(initial(REMAT), initial(FULL))
  chex.assert_trees_all_close(result(REMAT), result(FULL), rtol=1e-3, atol=1e-5)


def test_unknown_precision_is_refused():
  with pytest.raises(UserError, match="none, bfloat16, got 'float8'"):
    precision.with_half(FULL, 'float8', [resnet.ResNet])
  with pytest.raises(ValueError, match='needs the modules'):
    precision.with_half(FULL, 'bfloat16', [])
