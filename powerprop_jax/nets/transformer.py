"""Transformers: a decoder for text, and one that looks at images."""

import functools
import math

import haiku as hk
import jax
import jax.numpy as jnp

from powerprop_jax.nets import layers


class Transformer(hk.Module):
  """Blocks of attention and feed-forward layers on vectors [N, T, width].

  A block adds to its input what attention makes of its norm, and then what two
  layers with GELU between, four times as wide, make of the norm of that. A norm
  follows the last block. Linear layers have no bias; those that add to the
  input start smaller by the square root of twice the number of blocks.

  The layers of a block are norm, query, key, value and out in attention, and
  norm, expand and contract in feed_forward, in block_0 and so on. With a scan
  there is one block, whose parameters have a leading axis of blocks: it
  compiles in the time of one. Give pp.leaf_axes to budgets then, so that they
  see a stack of layers.

  Args:
    num_blocks: how many there are, at least 1.
    num_heads: of attention; it divides the width.
    is_causal: whether a position sees only those up to itself.
    dropout: share of what a block adds, and of attention, that is dropped in
      training, in [0, 1); apply needs a key for it.
    scan: whether the blocks are one block in a loop.

  Source:
    Vaswani et al., Attention Is All You Need, 2017
    (https://arxiv.org/abs/1706.03762), with the norms before and the first
    weights of GPT-2 (Radford et al., 2019).
  """

  def __init__(
    self,
    num_blocks: int,
    num_heads: int,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
    scan: bool = False,
    name: str | None = None,
  ):
    for what, value in (('num_blocks', num_blocks), ('num_heads', num_heads)):
      if value < 1:
        raise ValueError(f'{what} must be at least 1, got {value}.')
    if not 0 <= dropout < 1:
      raise ValueError(f'dropout must be in [0, 1), got {dropout}.')
    super().__init__(name=name)
    self._num_blocks, self._num_heads = num_blocks, num_heads
    self._is_causal, self._dropout, self._scan = is_causal, dropout, scan

  def __call__(self, x: jax.Array, is_training: bool = False) -> jax.Array:
    """Vectors [N, T, width] of such vectors."""
    width = x.shape[-1]
    if width % self._num_heads:
      raise ValueError(
        f'num_heads must divide the width {width}, got {self._num_heads}.'
      )
    dropout = self._dropout if is_training else 0.0
    block = functools.partial(
      _block,
      num_blocks=self._num_blocks,
      num_heads=self._num_heads,
      is_causal=self._is_causal,
      dropout=dropout,
    )
    if self._scan:
      x = hk.layer_stack(self._num_blocks, name='blocks')(block)(x)
    else:
      for index in range(self._num_blocks):
        with hk.name_scope(f'block_{index}'):
          x = block(x)
    return _norm('norm')(x)


def _block(
  x: jax.Array,
  *,
  num_blocks: int,
  num_heads: int,
  is_causal: bool,
  dropout: float,
) -> jax.Array:
  width = x.shape[-1]
  last_init = hk.initializers.VarianceScaling(
    0.5 / num_blocks, 'fan_in', 'truncated_normal'
  )
  linear = functools.partial(layers.linear, with_bias=False)
  with hk.name_scope('attention'):
    y = _norm('norm')(x)
    query, key, value = (
      linear(width, name)(y).reshape(*y.shape[:2], num_heads, -1)
      for name in ('query', 'key', 'value')
    )
    y = _attend(query, key, value, is_causal, dropout).reshape(x.shape)
    x += _dropped(linear(width, 'out', w_init=last_init)(y), dropout)
  with hk.name_scope('feed_forward'):
    y = jax.nn.gelu(linear(4 * width, 'expand')(_norm('norm')(x)))
    y = linear(width, 'contract', w_init=last_init)(y)
    return x + _dropped(y, dropout)


def _attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  is_causal: bool,
  dropout: float,
) -> jax.Array:
  """Means of values [N, T, heads, width], by how queries go with keys."""
  scores = jnp.einsum('nthd,nshd->nhts', query, key)
  scores /= math.sqrt(query.shape[-1])
  if is_causal:
    seen = jnp.tril(jnp.ones((1, 1, *scores.shape[-2:]), bool))
    scores = jnp.where(seen, scores, -jnp.inf)
  shares = _dropped(jax.nn.softmax(scores), dropout)
  return jnp.einsum('nhts,nshd->nthd', shares, value)


class GPT(hk.Module):
  """A decoder for text: of each position, logits of the token that follows.

  Tokens and positions have vectors that are learned, and are no weights that
  masks concern. 6 blocks of width 384 and a context of 128 have 10,725,888
  parameters for 65 tokens.

  Args:
    num_tokens: how many different ones there are.
    context: the longest text, in tokens.

  Source:
    Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
  """

  def __init__(
    self,
    num_tokens: int,
    *,
    num_blocks: int,
    num_heads: int,
    width: int,
    context: int,
    dropout: float = 0.0,
    scan: bool = False,
    name: str | None = None,
  ):
    super().__init__(name=name or f'gpt_{num_blocks}_{width}')
    self._num_tokens, self._width = num_tokens, width
    self._context, self._dropout = context, dropout
    self._make_blocks = lambda: Transformer(
      *(num_blocks, num_heads), is_causal=True, dropout=dropout, scan=scan
    )

  def __call__(self, tokens: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, T, num_tokens] of tokens [N, T], integers from 0 on."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise ValueError(
        'tokens must be integers of shape [N, T], got '
        f'{tokens.dtype}{list(tokens.shape)}.'
      )
    length = tokens.shape[1]
    if length > self._context:
      raise ValueError(
        f'a text may have at most {self._context} tokens, got {length}.'
      )
    init = hk.initializers.RandomNormal(0.02)
    embed = hk.Embed(self._num_tokens, self._width, w_init=init, name='tokens')
    positions = hk.get_parameter(
      'positions', (self._context, self._width), init=init
    )
    x = embed(tokens) + positions[jnp.newaxis, :length]
    x = _dropped(x, self._dropout if is_training else 0.0)
    x = self._make_blocks()(x, is_training)
    return layers.linear(self._num_tokens, 'logits', with_bias=False)(x)


class ViT(hk.Module):
  """A vision transformer: patches of an image, blocks, their mean, one layer.

  Patches do not overlap; their positions have vectors that are learned.

  Args:
    patch: height and width of a patch.

  Source:
    Dosovitskiy et al., An Image is Worth 16×16 Words, 2020
    (https://arxiv.org/abs/2010.11929), with the mean in place of a token for
    the class (Beyer et al., Better plain ViT baselines, 2022).
  """

  def __init__(
    self,
    num_classes: int,
    *,
    num_blocks: int,
    num_heads: int,
    width: int,
    patch: int,
    dropout: float = 0.0,
    scan: bool = False,
    name: str | None = None,
  ):
    super().__init__(name=name or f'vit_{num_blocks}_{width}')
    self._num_classes, self._width = num_classes, width
    self._patch, self._dropout = patch, dropout
    self._make_blocks = lambda: Transformer(
      *(num_blocks, num_heads), dropout=dropout, scan=scan
    )

  def __call__(self, images: jax.Array, is_training: bool = False) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C]."""
    layers.check_images(images)
    x = layers.conv(self._width, self._patch, 'stem', stride=self._patch)(
      images
    )
    x = x.reshape(x.shape[0], -1, self._width)
    init = hk.initializers.RandomNormal(0.02)
    x += hk.get_parameter('positions', (1, *x.shape[1:]), x.dtype, init=init)
    x = _dropped(x, self._dropout if is_training else 0.0)
    x = self._make_blocks()(x, is_training)
    return layers.linear(self._num_classes, 'logits')(jnp.mean(x, axis=1))


def _norm(name: str) -> hk.LayerNorm:
  return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)


def _dropped(x: jax.Array, rate: float) -> jax.Array:
  return layers.dropout(x, rate) if rate else x
