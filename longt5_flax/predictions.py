"""What a model writes for inputs: decoded over all devices, in batches of
about the same length."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from longt5_flax.config import LongT5Config
from longt5_flax.generation.generate import generate, start_tokens
from longt5_flax.generation.options import GenerationOptions
from longt5_flax.interop.layers import unstack_layers
from longt5_flax.model import decoding
from longt5_flax.training import partitioning

# Shorter inputs are padded to it.
_SHORTEST = 128


class DecodingBatch(NamedTuple):
  """Inputs that are decoded together.

  Attributes:
    numbers: of the inputs.
    length: that they are padded to.
  """
  numbers: list[int]
  length: int


def plan_batches(lengths: Sequence[int], batch_size: int, limit: int
                 ) -> list[DecodingBatch]:
  """Batches of about the same length, the longest first.

  So memory is known to suffice, and the time left is not underestimated. Only
  the last batch may have fewer inputs. Lengths are `limit`, its half, its
  quarter, ...: few, as a program is compiled for each.

  Args:
    lengths: of the inputs, at most `limit`.
    batch_size: inputs of a batch.
    limit: the greatest length.
  """
  order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
  batches = []
  for start in range(0, len(order), batch_size):
    numbers = order[start:start + batch_size]
    longest, length = lengths[numbers[0]], limit
    while -(-length // 2) >= max(longest, _SHORTEST):
      length = -(-length // 2)
    batches.append(DecodingBatch(numbers, length))
  return batches


class Predictor:
  """Writes, greedily or by beam search, on all devices of a mesh.

  All processes of a run must call it with the same arguments.

  Args:
    model: LongT5ForConditionalGeneration.
    mesh: of its parameters.
    options: how to decode.
    batch_size: rows that are decoded at a time. Fewer inputs, and a number
      that the mesh does not divide, are filled up with empty rows.
  """

  def __init__(self, model: nn.Module, mesh: Mesh, options: GenerationOptions,
               batch_size: int):
    self._mesh = mesh
    self._rows = batch_size + -batch_size % partitioning.rows_divisor(mesh)
    self._program = _program(model, mesh, options)

  def __call__(self, params: Any, inputs: Sequence[Any],
               length: int) -> Int[np.ndarray, 'B T']:
    """The tokens written for each input, without the start token.

    Args:
      params: of the model.
      inputs: ids of each, at most `batch_size` of them.
      length: that they are padded to.
    """
    tokens = np.zeros((self._rows, length), np.int32)
    segment_ids = np.zeros_like(tokens)
    segment_ids[:, 0] = 1  # Attention needs something to attend to.
    for row, ids in enumerate(inputs):
      tokens[row, :len(ids)] = ids
      segment_ids[row, :len(ids)] = 1
    rows = partitioning.local_rows(self._mesh, self._rows)
    batch = partitioning.global_batch(
        self._mesh, rows, {'tokens': tokens[rows],
                           'segment_ids': segment_ids[rows]}, self._rows)
    with partitioning.active(self._mesh):
      written = self._program(params, **batch)
    return np.asarray(written)[:len(inputs)]


@functools.cache
def _program(model, mesh, options):
  """Inputs to tokens; every process gets all of them."""
  decode = functools.partial(_decode, model, options)
  if mesh.size == mesh.shape['data']:
    # Each device decodes its own rows. XLA, which does not know that the beams
    # of an input stay together, would send all keys and values round at every
    # step.
    rows = PartitionSpec('data')
    decode = jax.shard_map(
        functools.partial(_without_rules, decode), mesh=mesh,
        in_specs=(PartitionSpec(), rows, rows), out_specs=rows,
        check_vma=False)

  def write(params, tokens, segment_ids):
    encoded = model.apply(
        {'params': params}, tokens, segment_ids, method='encode')
    return decode(params, encoded, segment_ids)

  return jax.jit(write, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _without_rules(decode, *args):
  """Calls it where an array is a device's own, and nothing is to be split."""
  with nn.logical_axis_rules(()):
    return decode(*args)


def _decode(model, options, params, encoded, segment_ids):
  """[B, max_length - 1] tokens."""
  if model.scan_layers:
    # A loop over layers would copy each one's keys and values out of those of
    # all, at every step.
    model, params = model.clone(scan_layers=False), unstack_layers(params)
  cache = decoding.start(model, params, encoded, segment_ids,
                         options.max_length - 1, options.rows_per_input,
                         may_reorder=options.num_beams > 1)
  written = generate(
      functools.partial(decoding.step, model, params), decoding.reorder, cache,
      start_tokens(len(encoded), options), options)
  return written.sequences[:, 1:]


def writing_options(model: LongT5Config, max_tokens: int, **options: Any
                    ) -> GenerationOptions:
  """How to decode with a model's special ids.

  Args:
    model: the architecture.
    max_tokens: to write, the end of sequence counted.
    **options: others of GenerationOptions.

  Raises:
    GenerationError: a value breaks its rule.
  """
  return GenerationOptions(
      max_length=max_tokens + 1, eos_token_ids=(model.eos_token_id,),
      pad_token_id=model.pad_token_id,
      decoder_start_token_id=model.decoder_start_token_id, **options)
