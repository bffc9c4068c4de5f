"""T5's loss: cross entropy with label smoothing and z-loss, as sums."""

from typing import NamedTuple

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
  target_logits = jnp.take_along_axis(
      logits, targets[..., None], axis=-1)[..., 0]
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
