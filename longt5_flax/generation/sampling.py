"""One sequence a row: the likeliest token each time, or one drawn."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from longt5_flax.generation.options import GenerationOptions
from longt5_flax.generation.scores import adjust_scores, ends, restrict_draw
from longt5_flax.generation.steps import Step, room_for, row_wise, token_at


class _Loop(NamedTuple):
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

  def body(loop):
    logits, cache = step(loop.cache, token_at(loop.tokens, loop.length - 1))
    scores = adjust_scores(logits, loop.tokens, loop.length, options)
    if options.do_sample:
      assert key is not None
      token = row_wise(jax.random.categorical, key, loop.length,
                       restrict_draw(scores, options))
    else:
      token = jnp.argmax(scores, axis=1)
    token = jnp.where(loop.done, options.pad_token_id, token.astype(jnp.int32))
    return _Loop(loop.length + 1, loop.tokens.at[:, loop.length].set(token),
                 loop.done | ends(token, options), cache)

  first = _Loop(
      jnp.asarray(prompt.shape[1], jnp.int32),
      room_for(prompt, options.max_length, options.pad_token_id),
      jnp.zeros(len(prompt), bool), cache)
  return jax.lax.while_loop(
      lambda loop: (loop.length < options.max_length) & ~jnp.all(loop.done),
      body, first).tokens
