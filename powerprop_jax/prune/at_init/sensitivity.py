"""Scores from the loss at initialisation: SNIP and GraSP.

Both are trees of float32 like θ, larger = keep, to be ranked over the whole
network. Leaves that select does not choose score 0.
"""

import jax
import jax.numpy as jnp

from powerprop_jax.core import scores, trees
from powerprop_jax.core import select as select_lib
from powerprop_jax.core.trees import Params, Select, Tree
from powerprop_jax.prune.at_init import from_scores, gradients
from powerprop_jax.prune.at_init.gradients import Batches, Loss


def snip(
  loss_fn: Loss,
  theta: Params,
  batches: Batches,
  *,
  select: Select = select_lib.is_weight,
) -> Tree:
  """|θ ∂L/∂θ|, how much the loss changes as a weight is taken away.

  Args:
    loss_fn: (theta, *batch) -> mean loss over the examples of a batch, such as
      classification_loss.
    batches: tuples of arrays, the examples along the first axis; the gradient
      is the mean over all of them, one batch in memory at a time. Inside jit,
      a sequence.

  Raises:
    ValueError: if there is no data, or the scores are not finite or all zero
      (which is not checked inside jit).

  Note:
    The paper divides by the sum of the scores, which does not change the order.
    Its authors' code ranks biases as well; see select.

  Example:
    >>> loss_fn = lambda theta, x: jnp.mean(x @ theta['linear']['w'])
    >>> theta = {'linear': {'w': jnp.array([[3.], [-1.]])}}
    >>> snip(loss_fn, theta, [(jnp.array([[1., 2.]]),)])['linear']['w']
    Array([[3.],
           [2.]], dtype=float32)

  Source:
    Lee et al., SNIP: single-shot network pruning based on connection
    sensitivity, 2019, equation 6 (https://arxiv.org/abs/1810.02340).
  """
  grads = gradients.mean_gradient(loss_fn, theta, batches)
  saliency = _only(select, scores.saliency(theta, grads))
  from_scores.check_scores(saliency, 'SNIP', select)
  return saliency


def grasp(
  loss_fn: Loss,
  theta: Params,
  batches: Batches,
  *,
  select: Select = select_lib.is_weight,
) -> Tree:
  """θ · (H g), how much the norm of the gradient falls without a weight.

  With g = ∂L/∂θ and H the second derivative, -θ · (H g) is the first-order
  change of |g|² (up to a factor) as a weight is taken away. GraSP keeps the
  weights without which the gradient would shrink, so scores have both signs.

  Args:
    loss_fn: as for snip, with a second derivative. The paper divides logits by
      a temperature of 200.
    batches: as for snip. They are gone through twice, first for g and then for
      H g; those of an iterator are kept in a list.
    select: leaves that are scored; g and H are theirs.

  Raises:
    ValueError: as for snip; also if H g is zero everywhere, for instance
      because the loss is piecewise linear in the weights.

  Note:
    The authors initialise linear layers again before scoring; here the weights
    are those that are given. Their batch has 10 examples of each class.

  Example:
    >>> loss_fn = lambda theta, x: jnp.mean((x @ theta['linear']['w']) ** 2)
    >>> theta = {'linear': {'w': jnp.array([[1.], [-1.]])}}
    >>> grasp(loss_fn, theta, [(jnp.array([[2., 1.]]),)])['linear']['w']
    Array([[ 40.],
           [-20.]], dtype=float32)

  Source:
    Wang et al., Picking winning tickets before training by preserving gradient
    flow, 2020, equation 8 (https://arxiv.org/abs/2002.07376).
  """
  batches = list(batches)
  grads = _only(select, gradients.mean_gradient(loss_fn, theta, batches))
  if from_scores.is_zero(grads):
    raise ValueError(
      'the gradient is zero everywhere, so GraSP has nothing to preserve. '
      'Check that the loss depends on the weights that select chooses.'
    )
  curvature = gradients.mean_curvature(loss_fn, theta, grads, batches)
  curvature = _only(select, curvature)
  if from_scores.is_zero(curvature):
    raise ValueError(
      'the loss has no second derivative in the weights: H g is zero '
      'everywhere, and so is every score of GraSP. Use a curved loss, such as '
      'cross-entropy without published_nll, or SNIP.'
    )
  multiply = lambda t, h: t.astype(jnp.float32) * h
  flow = jax.tree.map(multiply, theta, curvature)
  from_scores.check_scores(flow, 'GraSP', select)
  return flow


def _only(select: Select, tree: Tree) -> Tree:
  """The tree with zeros in place of the leaves that are not selected."""
  return trees.map_leaves(
    lambda leaf: leaf.value if select(*leaf) else jnp.zeros_like(leaf.value),
    tree,
  )
