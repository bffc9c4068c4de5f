"""The kernel of a step of decoding against attention to all of the cache."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.model import decoder, decoding
from longt5_flax.model.attention import full_attention
from longt5_flax.model.cached_attention import (
    cached_attention,
    kernel_takes,
    seen_places,
)
from longt5_flax.model.kernels.calls import KernelOptions
from longt5_flax.model.segment_attention import attend_to_stored
from longt5_flax.training import partitioning

INTERPRETED = KernelOptions(interpret=True)


class Arguments(NamedTuple):
  """Of `cached_attention`."""
  new: Any
  cache: Any
  bias: Any
  held_by: Any
  seen: Any
  start: Any


def random_arguments(groups, n, heads, room, size, start, dtype=jnp.float32):
  """Rows that go on from any row of their group, at first all from one, and see
  nothing at some positions."""
  generator = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(generator.normal(size=shape), dtype)

  held_by = generator.integers(-1, n, size=(groups, n, room))
  held_by[:, :, :start // 2] = held_by[:, :1, :start // 2]
  held_by[:, :, start] = np.arange(n)
  held_by[:, :, start + 1:] = -1
  held_by = jnp.asarray(held_by, jnp.int32)
  starts = jnp.full((groups, 1), start, jnp.int32)
  return Arguments(
      tuple(normal(groups, n, heads, size) for _ in range(3)),
      tuple(normal(groups, heads, n, room, size) for _ in range(2)),
      normal(heads, room).astype(jnp.float32), held_by,
      seen_places(held_by, starts, INTERPRETED), starts)


def of_all(arguments):
  """What `cached_attention` computes, from all scores in float32."""
  query, *new = (x.astype(jnp.float32) for x in arguments.new)
  now = int(arguments.start[0, 0])
  cache = [x.astype(jnp.float32).at[:, :, :, now].set(y.swapaxes(1, 2))
           for x, y in zip(arguments.cache, new, strict=True)]
  groups, heads, n, _, size = cache[0].shape
  key, value = (
      x.reshape(groups, heads, -1, size).swapaxes(1, 2) for x in cache)
  sees = arguments.held_by[:, :, None] == jnp.arange(n)[:, None]
  output, _ = full_attention(
      query, key, value, jnp.tile(arguments.bias, (1, n))[None, :, None],
      sees.reshape(groups, 1, n, -1), jnp.float32)
  return output, *cache


@pytest.mark.parametrize('shape, start', [
    ((2, 3, 2, 70, 16), 41), ((2, 3, 2, 70, 16), 69), ((3, 1, 2, 16, 16), 0),
    ((2, 4, 1, 200, 32), 128), ((1, 32, 2, 129, 16), 64)])
def test_equals_attention_to_all(shape, start):
  arguments = random_arguments(*shape, start)
  found = jax.jit(lambda x: cached_attention(*x, jnp.float32, INTERPRETED))(
      arguments)
  golden.assert_trees_close(dict(enumerate(found)),
                            dict(enumerate(of_all(arguments))))


def test_seen_places_written_out():
  held_by = jnp.array([
      [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 2, 2]],
      [[0, 0, 0, 0, 0], [-1, -1, 1, 1, 1], [2, -1, 2, -1, 2]]])
  seen = seen_places(
      held_by, jnp.array([[4], [3]]), INTERPRETED._replace(tile=4))
  assert seen[:, 2, 0].tolist() == [5, 6]
  assert seen[0, :2, :9].tolist() == [
      [0, 1, 7, 8, 13] + 4 * [0], [7, 7, 7, 3, 4] + 4 * [0]]
  assert seen[1, :2, :10].tolist() == [
      [0, 1, 2, 7, 10, 12] + 4 * [0], [1, 1, 1, 2, 4, 4] + 4 * [0]]


def test_reads_only_what_is_seen():
  """Nothing else of the cache, which may be no number, but for the very first
  place, with which a tile is filled up."""
  arguments = random_arguments(2, 3, 2, 200, 16, 150)
  before = arguments.held_by.at[:, :, 150].set(-1)
  is_seen = jnp.any(before[:, None] == jnp.arange(3)[:, None, None], axis=2)
  is_seen = is_seen.at[:, 0, 0].set(True)[:, None, ..., None]
  found = cached_attention(*arguments._replace(cache=tuple(
      jnp.where(is_seen, x, jnp.nan) for x in arguments.cache)),
                           jnp.float32, INTERPRETED)[0]
  golden.assert_close(found, of_all(arguments)[0])


def test_takes_as_many_rows_as_it_has_bits():
  assert kernel_takes(32, 256, 64)
  assert not kernel_takes(33, 256, 64)


CONFIG = LongT5Config.preset('local-tiny', num_layers=2, vocab_size=50)
SEGMENTS = jnp.array(np.arange(30) < [[30], [11]], jnp.int32)


@pytest.fixture
def interpreted(monkeypatch):
  for attend in (attend_to_stored, cached_attention, seen_places):
    monkeypatch.setattr(decoder, attend.__name__,
                        partial(attend, options=INTERPRETED))


def logits_of_steps(
    attention, params, prompt_mask=None, rows=3, room=20, scan_layers=False):
  """Of a prompt of two tokens and of two steps, rows changing places before
  each. One row an input has no others to go on from."""
  model = LongT5ForConditionalGeneration(
      CONFIG, scan_layers=scan_layers, attention=attention)
  encoded = jax.random.normal(jax.random.key(0), (2, 30, CONFIG.d_model))
  tokens = jax.random.randint(jax.random.key(1), (2 * rows, 4), 2, 50)

  @golden.jit
  def run(params):
    cache = decoding.start(
        model, params, encoded, SEGMENTS, room, rows, prompt_mask)
    found = []
    for first, end in ((0, 2), (2, 3), (3, 4)):
      logits, cache = decoding.step(
          model, params, cache, tokens[:, first:end])
      found.append(logits)
      if rows > 1:
        cache = decoding.reorder(cache, jnp.array([1, 1, 0, 5, 3, 3]))
    return jnp.stack(found)

  return run(params)


def random_params(scan_layers=False):
  return golden.random_params(
      LongT5ForConditionalGeneration(CONFIG, scan_layers=scan_layers),
      SEGMENTS, SEGMENTS[:, :2])


@pytest.mark.parametrize('prompt_mask, rows', [
    (None, 3), (None, 1), (jnp.array([[True, False], [False, True]]), 3)])
def test_in_decoding(interpreted, prompt_mask, rows):
  params = random_params()
  expected, found = (logits_of_steps(attention, params, prompt_mask, rows)
                     for attention in ('reference', 'fused'))
  golden.assert_close(found, expected)


@pytest.mark.parametrize('rows', [3, 1])
def test_on_a_mesh(interpreted, rows):
  """Inputs and heads on devices of their own."""
  params = random_params()
  expected = logits_of_steps('reference', params, rows=rows)
  mesh = partitioning.make_mesh(
      {'data': 2, 'fsdp': 1, 'tensor': 2, 'sequence': 1}, jax.devices()[:4])
  with partitioning.active(mesh):
    found = logits_of_steps('fused', params, rows=rows)
  golden.assert_close(found, expected)


@pytest.mark.parametrize('room, scan_layers', [(8, False), (20, True)])
def test_where_the_kernel_does_not_fit(
    interpreted, monkeypatch, room, scan_layers):
  """Too small a room for a product; a loop over layers."""
  monkeypatch.setattr(decoder, 'cached_attention', None)
  params = random_params(scan_layers)
  expected, found = (
      logits_of_steps(attention, params, room=room, scan_layers=scan_layers)
      for attention in ('reference', 'fused'))
  golden.assert_close(found, expected)


def attend_on_a_gpu(arguments, dtype):
  seen = seen_places(arguments.held_by, arguments.start)
  return cached_attention(*arguments._replace(seen=seen), dtype)


def test_is_compiled_for_cuda():
  arguments = random_arguments(2, 4, 12, 256, 64, 100, jnp.bfloat16)
  lowered = golden.lowered_for_cuda(
      partial(attend_on_a_gpu, dtype=jnp.bfloat16), arguments)
  assert 'longt5_cached_attention' in lowered
  assert 'longt5_seen_places' in lowered


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('n, room, start', [
    (1, 256, 255), (4, 256, 100), (4, 511, 450)])
def test_on_a_gpu(n, room, start, dtype):
  """Base's heads; what the cache held stays there."""
  arguments = random_arguments(8, n, 12, room, 64, start, dtype)
  output, *cache = jax.jit(
      partial(attend_on_a_gpu, dtype=dtype))(arguments)
  expected, *kept = of_all(arguments)
  for found, exact in zip(cache, kept, strict=True):
    np.testing.assert_array_equal(found.astype(jnp.float32), exact)
  if dtype == jnp.float32:
    golden.assert_close(output, expected)
  else:
    error = jnp.linalg.norm(output - expected) / jnp.linalg.norm(expected)
    assert error < 2 * jnp.finfo(dtype).eps
