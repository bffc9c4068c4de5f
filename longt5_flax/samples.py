"""Held-out gap sentences beside what the model writes for them."""

from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.predictions import Predictor, writing_options

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


def write_samples(
    model: Any, params: Any, batch: dict[str, np.ndarray],
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
  inputs, targets = ([
      batch[f'{side}_tokens'][row][batch[f'{part}_segment_ids'][row] == segment]
      for row, segment in chosen] for side, part in (
          ('encoder_input', 'encoder'), ('decoder_target', 'decoder')))
  predict = Predictor(
      model, mesh, writing_options(model.config, settings.sample_length),
      len(chosen))
  written = predict(params, inputs, batch['encoder_input_tokens'].shape[1])
  return [Sample(_context(ids, mask_id, vocabulary),
                 vocabulary.decode(_text(target)),
                 vocabulary.decode(_text(tokens)))
          for ids, target, tokens in zip(inputs, targets, written, strict=True)]


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
