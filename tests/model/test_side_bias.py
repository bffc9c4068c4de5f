"""The side bias against looking it up score by score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax.model.global_tokens import (
    assign_global_blocks,
    segment_positions,
)
from longt5_flax.model.side_bias import side_bias

# An orphan, segments without a block, padding; and one long segment.
SEGMENT_IDS = jnp.asarray([
    [1] * 9 + [2] * 3 + [3] * 17 + [4] + [5] * 8 + [0] * 2,
    [1] * 40], jnp.int32)
BLOCK_IDS = assign_global_blocks(
    SEGMENT_IDS, segment_positions(SEGMENT_IDS), 4).block_ids.reshape(2, 5, 8)


def looked_up(bias, num_globals):
  reach = bias.shape[1] // 2
  offsets = jnp.arange(num_globals) - BLOCK_IDS[..., None]
  values = bias[:, jnp.clip(offsets, -reach, reach) + reach]  # H B N C G
  return jnp.moveaxis(jnp.where(BLOCK_IDS[..., None] >= 0, values, 0), 0, 2)


@pytest.mark.parametrize('reach', [3, 9, 20])
def test_equals_a_look_up(reach):
  """Within 10 global tokens the bias saturates, just so, and not at all."""
  bias = jax.random.normal(jax.random.key(0), (2, 2 * reach + 1))
  weight = jax.random.normal(jax.random.key(1), (2, 5, 2, 8, 10))
  made, gradient = jax.vjp(lambda bias: side_bias(bias, BLOCK_IDS, 10, 4), bias)
  expected, expected_gradient = jax.vjp(lambda bias: looked_up(bias, 10), bias)
  np.testing.assert_array_equal(made, expected)
  golden.assert_close(gradient(weight)[0], expected_gradient(weight)[0])
