"""Decoding step by step: what longt5_flax.generation asks of a model.

`step` (with model and params bound) and `reorder` are its two functions.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class DecodingCache(NamedTuple):
  """What the decoder remembers between steps.

  Attributes:
    encoder_segment_ids: 0 is padding.
    encoded: keys and values of the encoder's output, [B, H, L, K]: one row for
      each input, however many rows are decoded from it.
    targets: those of the tokens so far, and their number.
    target_mask: which tokens later ones may see; None is all.
  """
  encoder_segment_ids: Int[Array, 'B L']
  encoded: dict[str, Any]
  targets: dict[str, Any]
  target_mask: Bool[Array, 'rows room'] | None


def start(
    model: nn.Module,
    params: Any,
    encoder_output: Float[Array, 'B L D'],
    encoder_segment_ids: Int[Array, 'B L'],
    room: int,
    rows_per_input: int = 1,
    prompt_mask: Bool[Array, 'B P'] | None = None,
    may_reorder: bool = True,
) -> DecodingCache:
  """The cache before the first token.

  Args:
    model: LongT5ForConditionalGeneration.
    params: its parameters.
    encoder_output: from its `encode`.
    encoder_segment_ids: 0 is padding.
    room: the most tokens that `step` will be given; a sequence of n tokens
      needs n - 1.
    rows_per_input: rows = B * rows_per_input will be decoded, those of an
      input standing together.
    prompt_mask: which of the first P tokens, of each input, later ones may
      see; what follows them is seen. By default all are.
    may_reorder: whether `reorder` may be called. A row then attends to all rows
      of its input and picks what it goes on from: False where there are many
      and each goes its own way.
  """
  _, state = model.apply(
      {'params': params}, encoder_output, room, rows_per_input,
      may_reorder and rows_per_input > 1, method='init_cache',
      mutable=['encoded', 'cache'])
  if prompt_mask is not None:
    after = room - prompt_mask.shape[1]
    prompt_mask = jnp.repeat(jnp.pad(
        prompt_mask, ((0, 0), (0, after)), constant_values=True),
                             rows_per_input, axis=0)
  return DecodingCache(
      encoder_segment_ids, state['encoded'], state['cache'], prompt_mask)


def step(
    model: nn.Module,
    params: Any,
    cache: DecodingCache,
    tokens: Int[Array, 'rows T'],
) -> tuple[Float[Array, 'rows V'], DecodingCache]:
  """Float32 logits after the last token, and the cache with all of them."""
  logits, state = model.apply(
      {'params': params, 'encoded': cache.encoded, 'cache': cache.targets},
      tokens, cache.encoder_segment_ids, cache.target_mask,
      method='decode_step', mutable=['cache'])
  return logits[:, -1], cache._replace(targets=state['cache'])


def reorder(cache: DecodingCache, rows: Int[Array, 'rows']) -> DecodingCache:
  """The cache in which row i continues what was row `rows[i]`.

  Keys and values stay where they are; rows note whose they see. A row must come
  from the same input, whose rows have one mask. The cache must have been made
  for it, with several rows an input.
  """
  decoder = cache.targets['decoder']
  ancestors = jnp.take(decoder['ancestors'], rows, axis=0, mode='clip')
  return cache._replace(
      targets={'decoder': {**decoder, 'ancestors': ancestors}})
