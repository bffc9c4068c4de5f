"""T5's loss: cross entropy with label smoothing and z-loss, as sums; whole, or
in chunks that bound the memory of logits."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num


class LossSums(NamedTuple):
  """Sums over target tokens; divide by `weight_sum` for means.

  Attributes:
    loss_sum: cross entropy, z-loss included.
    z_loss_sum: the z-loss in it.
    weight_sum: how many tokens count.
    correct_sum: how many of them have their target as the likeliest token.
  """
  loss_sum: Float[Array, '']
  z_loss_sum: Float[Array, '']
  weight_sum: Float[Array, '']
  correct_sum: Float[Array, '']


def cross_entropy(
    logits: Float[Array, 'B T V'],
    targets: Int[Array, 'B T'],
    weights: Num[Array, 'B T'],
    *,
    z_loss: float = 1e-4,
    label_smoothing: float = 0.0,
) -> LossSums:
  """Sums of T5's loss over a batch, as t5x computes it.

  With lz the log of the softmax's denominator, a token costs
  lz - logit[target] + z_loss * lz ** 2. Label smoothing e gives the target
  1 - e and every other token e / (V - 1), and subtracts the entropy of that
  distribution, so that a perfect prediction still costs nothing.

  Args:
    logits: float32.
    targets: ids.
    weights: 0 for tokens that do not count.
    z_loss: keeps lz near 0, and so float32 logits well scaled.
    label_smoothing: e above, in [0, 1).
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # No gather: its gradient would scatter into another array of logits' size,
  # and a vocabulary that devices share out would be put together.
  is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
  target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  loss = log_z - target_logits
  if label_smoothing:
    others = label_smoothing / (logits.shape[-1] - 1)
    confidence = 1.0 - label_smoothing
    # Cross entropy with the soft target, without building it.
    loss = log_z - (confidence - others) * target_logits - others * jnp.sum(
        logits, axis=-1)
    loss += confidence * np.log(confidence) + (
        logits.shape[-1] - 1) * others * np.log(others + 1e-20)
  z_losses = z_loss * jnp.square(log_z)
  weights = weights.astype(jnp.float32)
  correct = jnp.argmax(logits, axis=-1) == targets
  return LossSums(
      jnp.sum((loss + z_losses) * weights), jnp.sum(z_losses * weights),
      jnp.sum(weights), jnp.sum(correct * weights))


def chunked_cross_entropy(
    head: Callable[[Any, Float[Array, 'B C D']], Float[Array, 'B C V']],
    params: Any,
    features: Float[Array, 'B T D'],
    targets: Int[Array, 'B T'],
    weights: Num[Array, 'B T'],
    *,
    max_bytes: int,
    **options: float,
) -> LossSums:
  """`cross_entropy(head(params, features), ...)` without all logits at once.

  Only `loss_sum` has a gradient, by `params` and `features`. It is computed
  together with the loss while a chunk's logits are there, so that no product is
  computed twice.

  Args:
    head: the output layer, position by position; closes over no array.
    params: the output layer's, and no others: their gradient is summed over
      chunks.
    features: what the output layer gets.
    targets: ids.
    weights: 0 for tokens that do not count.
    max_bytes: that the float32 logits of a chunk may take on one device, if one
      position a row does not take more; 0: all positions are one chunk.
    **options: of `cross_entropy`.
  """
  loss = functools.partial(_head_loss, head, tuple(options.items()))
  shape = jax.eval_shape(head, params, features).shape
  length, chunks = shape[1], _num_chunks(shape, max_bytes)
  if chunks == 1:
    return loss(params, features, targets, weights)
  width = -(-length // chunks)

  def split(x):
    # Chunk c has the positions c, c + chunks, ...: devices that share out a
    # row all have a part of every chunk.
    x = jnp.pad(x, ((0, 0), (0, chunks * width - length))
                + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(
        x.reshape(x.shape[0], width, chunks, *x.shape[2:]), 2, 0)

  return _sum_chunks(loss, params, split(features),
                     (split(targets), split(weights)))


def _num_chunks(shape, max_bytes):
  """Into how many chunks of positions logits of a shape are cut."""
  rows, length, vocabulary = shape
  if not max_bytes:
    return 1
  devices = max(jax.sharding.get_abstract_mesh().size, 1)
  width = max_bytes * devices // (4 * rows * vocabulary)
  return math.ceil(length / max(width, 1))


def _head_loss(head, options, params, features, targets, weights):
  return cross_entropy(head(params, features), targets, weights,
                       **dict(options))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_chunks(loss, params, features, labels):
  """The sums of `loss` over chunks, the leading axis of features and labels."""
  def add(total, chunk):
    return jax.tree.map(jnp.add, total, loss(params, *chunk)), None

  return jax.lax.scan(add, _no_sums(), (features, *labels))[0]


def _sum_chunks_fwd(loss, params, features, labels):
  def loss_sum(params, *chunk):
    sums = loss(params, *chunk)
    return sums.loss_sum, sums

  def add(total, chunk):
    (_, sums), (by_params, by_features) = jax.value_and_grad(
        loss_sum, argnums=(0, 1), has_aux=True)(params, *chunk)
    return jax.tree.map(jnp.add, total, (sums, by_params)), by_features

  (sums, by_params), by_features = jax.lax.scan(
      add, (_no_sums(), jax.tree.map(jnp.zeros_like, params)),
      (features, *labels))
  return sums, (by_params, by_features)


def _sum_chunks_bwd(loss, gradients, cotangents):
  del loss
  by_params, by_features = jax.tree.map(
      lambda x: x * cotangents.loss_sum, gradients)
  return by_params, by_features, None


_sum_chunks.defvjp(_sum_chunks_fwd, _sum_chunks_bwd)


def _no_sums():
  return LossSums(*(jnp.zeros(()) for _ in LossSums._fields))
