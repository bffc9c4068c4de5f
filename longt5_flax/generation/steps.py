"""What the decoding loops share: the model's two functions, and the array of
tokens."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# (cache, tokens [rows, T]) -> (logits after the last of them [rows, V], cache)
Step = Callable[[Any, Int[Array, 'rows T']],
                tuple[Float[Array, 'rows V'], Any]]
# (cache, rows [rows]) -> the cache in which row i goes on from rows[i]
Reorder = Callable[[Any, Int[Array, 'rows']], Any]


def room_for(prompt: Int[Array, '*rows P'], max_length: int,
             fill: int) -> Int[Array, '*rows max_length']:
  """The prompt, and room for what will be written."""
  room = [(0, 0)] * (prompt.ndim - 1) + [(0, max_length - prompt.shape[-1])]
  return jnp.pad(prompt, room, constant_values=fill)


def token_at(tokens: Int[Array, 'rows max_length'],
             position: Int[Array, '']) -> Int[Array, 'rows 1']:
  """One token of each row."""
  return jax.lax.dynamic_slice_in_dim(tokens, position, 1, axis=1)


def row_wise(
    draw: Callable[[Array, Any], Array], key: Array, length: Int[Array, ''],
    scores: Float[Array, 'rows V'],
) -> Array:
  """Draws for each row by a key of its own, so that rows do not depend on how
  many there are.

  Args:
    draw: gives what is drawn for one row, from a key and the row's scores.
    key: of the whole sequence.
    length: of the sequence so far.
    scores: of all rows.
  """
  key = jax.random.fold_in(key, length)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(scores)))
  return jax.vmap(draw)(keys, scores)
