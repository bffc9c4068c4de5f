"""Held-out gap sentences beside what the model writes for them."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.generation.generate import generate, start_tokens
from longt5_flax.generation.options import GenerationOptions
from longt5_flax.model import decoding

# Tokens of the document shown on either side of the first mask.
_CONTEXT = 48


class Sample(NamedTuple):
  """One held-out example.

  Attributes:
    context: the document around its first masked sentence.
    target: the masked sentences.
    written: what the model wrote in their place.
  """
  context: str
  target: str
  written: str


@partial(jax.jit, static_argnums=(0, 4))
def _write(model, params, tokens, segment_ids, max_length):
  config = model.config
  options = GenerationOptions(
      max_length=max_length + 1, eos_token_ids=(config.eos_token_id,),
      pad_token_id=config.pad_token_id,
      decoder_start_token_id=config.decoder_start_token_id)
  encoded = model.apply(
      {'params': params}, tokens, segment_ids, method='encode')
  written = generate(
      partial(decoding.step, model, params), decoding.reorder,
      decoding.start(model, params, encoded, segment_ids, max_length),
      start_tokens(len(tokens), options), options)
  return written.sequences[:, 1:]


def write_samples(
    model: nn.Module, params: Any, batch: dict[str, np.ndarray],
    vocabulary: Vocabulary, mask_id: int, settings: Any, mesh: Mesh,
) -> list[Sample]:
  """Lets the model write what is masked in examples of a batch.

  All processes of a run must call it.

  Args:
    model: LongT5ForConditionalGeneration.
    params: its parameters.
    batch: held-out rows, [B, length], all of them on every process.
    vocabulary: to read tokens.
    mask_id: what stands for a masked sentence.
    settings: `samples`, how many, and `sample_length`, tokens at most.
    mesh: of the parameters.
  """
  chosen = _choose(batch, mask_id, settings)
  rows = [row for row, _ in chosen]
  segments = np.array([[segment] for _, segment in chosen])
  segment_ids = (batch['encoder_segment_ids'][rows] == segments).astype(
      np.int32)
  tokens = batch['encoder_input_tokens'][rows] * segment_ids
  is_target = batch['decoder_segment_ids'][rows] == segments
  targets = batch['decoder_target_tokens'][rows]
  whole = NamedSharding(mesh, PartitionSpec())

  def everywhere(array):
    return jax.make_array_from_callback(array.shape, whole, lambda i: array[i])

  written = np.asarray(_write(model, params, everywhere(tokens),
                              everywhere(segment_ids), settings.sample_length))
  samples = []
  for i, row in enumerate(tokens):
    samples.append(Sample(
        _context(row[segment_ids[i] > 0], mask_id, vocabulary),
        vocabulary.decode(_text(targets[i][is_target[i]])),
        vocabulary.decode(_text(written[i]))))
  return samples


def _choose(batch, mask_id, settings):
  """(row, segment) of the examples to show: those whose targets the model has
  room to write, with one mask, and text around it, where there are such."""
  ranked = []
  for row, segments in enumerate(batch['encoder_segment_ids']):
    for segment in range(1, segments.max() + 1):
      ids = batch['encoder_input_tokens'][row][segments == segment]
      masks = np.flatnonzero(ids == mask_id)
      room = len(masks) and min(masks[0], len(ids) - masks[0]) >= _CONTEXT
      length = np.sum(batch['decoder_segment_ids'][row] == segment)
      fits = length <= settings.sample_length
      ranked.append((not (room and fits), len(masks) != 1, row, segment))
  return [best[2:] for best in sorted(ranked)[:settings.samples]]


def _text(ids):
  return [int(i) for i in ids if i > 1]  # Without padding and end.


def _context(ids, mask_id, vocabulary):
  masks = np.flatnonzero(ids == mask_id)
  first = int(masks[0]) if len(masks) else 0
  parts: list[str] = []
  shown = ids[max(0, first - _CONTEXT):first + _CONTEXT]
  for part in np.split(shown, np.flatnonzero(shown == mask_id)):
    if len(part) and part[0] == mask_id:
      parts.append('[MASK]')
      part = part[1:]
    parts.append(vocabulary.decode(_text(part)))
  return ' '.join(part for part in parts if part)
