"""Greedy decoding: the likeliest token, again and again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# (cache, tokens [B, 1]) -> (logits [B, 1, V], cache)
Step = Callable[[Any, Int[Array, 'B 1']],
                tuple[Float[Array, 'B 1 V'], Any]]


class _Loop(NamedTuple):
  length: Int[Array, '']
  tokens: Int[Array, 'B T']
  last: Int[Array, 'B 1']
  done: Bool[Array, 'B']
  cache: Any


def greedy_search(
    step: Step,
    cache: Any,
    batch_size: int,
    max_length: int,
    *,
    start_id: int = 0,
    eos_id: int = 1,
    pad_id: int = 0,
) -> Int[Array, 'B T']:
  """Decodes until every row has ended or is `max_length` tokens long.

  Jittable; one compiled loop.

  Args:
    step: gives the logits after one more token, and the cache that holds it.
    cache: of the inputs, with room for `max_length` tokens.
    batch_size: rows.
    max_length: the most tokens to write, the start token not counted.
    start_id: what decoding starts from.
    eos_id: ends a row, and is its last token.
    pad_id: fills the row after that.
  """

  def body(loop):
    logits, cache = step(loop.cache, loop.last)
    token = jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32)
    token = jnp.where(loop.done, pad_id, token)
    return _Loop(loop.length + 1, loop.tokens.at[:, loop.length].set(token),
                 token[:, None], loop.done | (token == eos_id), cache)

  first = _Loop(
      jnp.zeros((), jnp.int32),
      jnp.full((batch_size, max_length), pad_id, jnp.int32),
      jnp.full((batch_size, 1), start_id, jnp.int32),
      jnp.zeros(batch_size, bool), cache)
  return jax.lax.while_loop(
      lambda loop: (loop.length < max_length) & ~jnp.all(loop.done),
      body, first).tokens
