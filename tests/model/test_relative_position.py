"""Buckets of offsets, and the matrices of biases made from them."""

import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax.model.relative_position import (
  offset_bias,
  relative_position_bucket,
  toeplitz,
)


@pytest.mark.parametrize('direction', ['bidirectional', 'causal'])
def test_buckets_are_the_references(direction):
  expected = golden.read('relative_position_buckets')[direction]
  actual = relative_position_bucket(
      np.arange(-20000, 20001), bidirectional=direction == 'bidirectional')
  np.testing.assert_array_equal(actual, expected)


def test_exact_buckets_written_out():
  """Half of a direction's buckets hold one distance each."""
  offsets = np.arange(-9, 10)
  np.testing.assert_array_equal(
      relative_position_bucket(offsets, bidirectional=True),
      [8, 8, 7, 6, 5, 4, 3, 2, 1, 0,
       17, 18, 19, 20, 21, 22, 23, 24, 24])
  np.testing.assert_array_equal(
      relative_position_bucket(offsets, bidirectional=False),
      [9, 8, 7, 6, 5, 4, 3, 2, 1] + [0] * 10)


@pytest.mark.parametrize('num_buckets, max_distance', [(8, 20), (64, 500)])
def test_other_numbers_of_buckets(num_buckets, max_distance):
  """Every bucket is used, in order, and the last begins by max_distance."""
  causal = relative_position_bucket(
      -np.arange(2 * max_distance), bidirectional=False,
      num_buckets=num_buckets, max_distance=max_distance)
  assert (np.diff(causal) >= 0).all()
  assert set(causal) == set(range(num_buckets))
  assert causal[max_distance] == num_buckets - 1


def test_toeplitz_written_out():
  a, b, c, d, e = range(5)
  np.testing.assert_array_equal(
      toeplitz(jnp.array([[a, b, c, d, e]], jnp.float32), 3, 3),
      [[[c, d, e],
        [b, c, d],
        [a, b, c]]])


def test_a_bias_is_the_table_at_the_bucket():
  table = jnp.asarray(
      np.random.default_rng(0).standard_normal((3, 32)), jnp.float32)
  for bidirectional in (True, False):
    bias = toeplitz(
        offset_bias(table, -4, 6, bidirectional=bidirectional,
                    max_distance=128), 5, 7)
    for query in range(5):
      for key in range(7):
        bucket = int(relative_position_bucket(
            np.array([key - query]), bidirectional=bidirectional)[0])
        np.testing.assert_array_equal(bias[:, query, key], table[:, bucket])
