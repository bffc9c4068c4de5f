"""One sequence a row: the likeliest token each time, or one drawn."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from longt5_flax.generation.options import GenerationOptions
from longt5_flax.generation.scores import adjust_scores, ends, restrict_draw
from longt5_flax.generation.steps import Step, room_for, row_wise, token_at


class Written(NamedTuple):
  """State between tokens.

  Attributes:
    length: tokens of each row so far, the prompt counted.
    tokens: of all rows; filled after their end.
    done: rows that have ended.
    cache: of what stands before the last token.
  """
  length: Int[Array, '']
  tokens: Int[Array, 'rows max_length']
  done: Bool[Array, 'rows']
  cache: Any


def sample(
    step: Step,
    cache: Any,
    prompt: Int[Array, 'rows P'],
    options: GenerationOptions,
    key: Array | None,
) -> Int[Array, 'rows max_length']:
  """Decodes each row until it ends; `pad_token_id` fills what is left.

  Args:
    step: gives the logits after one more token, and the cache that holds it.
    cache: holds the prompt but for its last token.
    prompt: what the rows start with.
    options: with num_beams 1.
    key: for drawing. What a row draws depends on it and on the row's number,
      not on the other rows.
  """
  return jax.lax.while_loop(
      lambda written: is_open(written, options),
      lambda written: add_token(step, written, options, key),
      start(cache, prompt, options)).tokens


def start(cache: Any, prompt: Int[Array, 'rows P'],
          options: GenerationOptions) -> Written:
  """Before the first token; arguments are those of `sample`."""
  return Written(
      jnp.asarray(prompt.shape[1], jnp.int32),
      room_for(prompt, options.max_length, options.pad_token_id),
      jnp.zeros(len(prompt), bool), cache)


def is_open(written: Written, options: GenerationOptions) -> Bool[Array, '']:
  """Whether there is a token to add."""
  return (written.length < options.max_length) & ~jnp.all(written.done)


def add_token(step: Step, written: Written, options: GenerationOptions,
              key: Array | None) -> Written:
  """One more token of each row; arguments are those of `sample`."""
  logits, cache = step(
      written.cache, token_at(written.tokens, written.length - 1))
  scores = adjust_scores(logits, written.tokens, written.length, options)
  if options.do_sample:
    assert key is not None
    token = row_wise(jax.random.categorical, key, written.length,
                     restrict_draw(scores, options))
  else:
    token = jnp.argmax(scores, axis=1)
  token = jnp.where(written.done, options.pad_token_id, token.astype(jnp.int32))
  return Written(
      written.length + 1, written.tokens.at[:, written.length].set(token),
      written.done | ends(token, options), cache)
