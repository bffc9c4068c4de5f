"""Arguments of the models: checked, and made JAX arrays.

Shapes are always checked; values only where there are any, so not inside
`jax.jit` and its like.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from longt5_flax.config import ConfigError

Arrays = ArrayLike | Sequence[Any]


def token_ids(name: str, ids: Any, vocab_size: int) -> Int[Array, 'B L']:
  """Token ids as int32.

  Args:
    name: of the argument, for errors.
    ids: NumPy array, JAX array or nested list.
    vocab_size: ids must be below.

  Raises:
    ConfigError: not two dimensions, nothing in it, not integers, or an id that
      the vocabulary does not have.
  """
  ids = _array(name, ids)
  # An empty list has no dtype of its own.
  if ids.size and not jnp.issubdtype(ids.dtype, jnp.integer):
    raise ConfigError(f'{name} is of dtype {ids.dtype}: must be integers.')
  if ids.ndim != 2 or not ids.size:
    raise ConfigError(
        f'{name} has shape {ids.shape}: must be [batch, length], none of '
        'them 0.')
  if has_values(ids):
    values = np.asarray(ids)
    bad = values[(values < 0) | (values >= vocab_size)]
    if bad.size:
      raise ConfigError(f'{name} holds the id {bad[0]}: must be in '
                        f'[0, vocab_size={vocab_size}).')
  return jnp.asarray(ids, jnp.int32)


def attention_mask(
    name: str, mask: Any, shape: tuple[int, ...]
) -> Int[Array, 'B L']:
  """A mask as int32, 1 for what is seen; all ones if None.

  Args:
    name: of the argument, for errors.
    mask: integers, booleans or floats; above 0 is seen.
    shape: that it must have.

  Raises:
    ConfigError: it has another shape.
  """
  if mask is None:
    return jnp.ones(shape, jnp.int32)
  mask = _array(name, mask)
  if mask.shape != shape:
    raise ConfigError(f'{name} has shape {mask.shape}: must be {shape}.')
  return (jnp.asarray(mask) > 0).astype(jnp.int32)


def encoder_output(outputs: Any, batch_size: int,
                   features: int) -> Float[Array, 'B L D']:
  """The encoder's output, out of what `encode` returned.

  Args:
    outputs: an output object, a dict, or a tuple that starts with it.
    batch_size: rows that it must have.
    features: d_model.

  Raises:
    ConfigError: it is none of them, or has another shape.
  """
  if isinstance(outputs, tuple | list) and outputs:
    hidden = outputs[0]
  else:
    try:
      hidden = outputs['last_hidden_state']
    except (KeyError, TypeError, IndexError):
      raise ConfigError(
          'encoder_outputs must be what encode() returns, or a tuple that '
          'starts with last_hidden_state.') from None
  hidden = _array('encoder_outputs', hidden)
  if hidden.ndim != 3 or (hidden.shape[0], hidden.shape[2]) != (
      batch_size, features):
    raise ConfigError(
        f'encoder_outputs[0] has shape {hidden.shape}: must be '
        f'({batch_size}, length, d_model={features}), for {batch_size} rows '
        'to decode.')
  return jnp.asarray(hidden)


def decoder_positions(positions: Any, shape: tuple[int, ...],
                      start: Any) -> None:
  """Checks positions of targets, which LongT5 itself counts.

  Args:
    positions: None or ids [B, T], here only for code written for models with
      absolute positions.
    shape: that they must have.
    start: the position of the first; an integer or scalar array.

  Raises:
    ConfigError: they have another shape, or do not count up from `start`.
  """
  if positions is None:
    return
  positions = _array('decoder_position_ids', positions)
  if positions.shape != shape:
    raise ConfigError(f'decoder_position_ids has shape {positions.shape}: '
                      f'must be {shape}.')
  if has_values(positions) and has_values(start):
    first = int(start)
    if (np.asarray(positions) != first + np.arange(shape[1])).any():
      raise ConfigError(
          f'decoder_position_ids must count up from {first} in every row: '
          'relative positions are those of the tokens.')


def cache_length(max_length: Any) -> int:
  """How many targets a cache is to have room for.

  Raises:
    ConfigError: that is no integer, or less than 1.
  """
  if not isinstance(max_length, int | np.integer) or max_length < 1:
    raise ConfigError(
        f'max_length={max_length!r} must be an integer, at least 1.')
  return int(max_length)


def cache(past: Any, name_of_encoded: str, shape: tuple[int, ...]) -> None:
  """Checks that `past_key_values` was made for these inputs.

  Args:
    past: what `init_cache` or the last call gave.
    name_of_encoded: of the inputs' keys and values, if they are there.
    shape: of the encoder's output, [B, L, D].

  Raises:
    ConfigError: it is something else, or was made for other inputs.
  """
  try:
    length = shape[1]
    targets = past['cache']['decoder']['layers_0']['self_attention']['key']
    rows = targets.shape[0]
    if name_of_encoded in past:  # Else they will be made of these inputs.
      length = past[name_of_encoded]['decoder']['layers_0'][
          'encoder_decoder_attention']['key'].shape[2]
  except (KeyError, TypeError, IndexError):
    raise ConfigError('past_key_values must be what init_cache() or the last '
                      'decode() returned.') from None
  if (rows, length) != shape[:2]:
    raise ConfigError(
        f'past_key_values is for inputs of shape {(rows, length)}: '
        f'encoder_outputs[0] has {shape[:2]}.')


def room_for(count: int, length: Any, room: int) -> None:
  """Checks that a cache of `length` targets out of `room` takes `count` more.

  Raises:
    ConfigError: it does not.
  """
  used = int(length) if has_values(length) else 0
  if used + count > room:
    raise ConfigError(
        f'past_key_values has room for {room} targets and holds {used}: '
        f'decoder_input_ids has {count} more.')


def has_values(array: Any) -> bool:
  """Whether there are values to look at, and all of them are here."""
  if isinstance(array, jax.core.Tracer):
    return False
  return not isinstance(array, jax.Array) or array.is_fully_addressable


def _array(name, values):
  if isinstance(values, jax.Array | np.ndarray):
    return values
  try:
    return np.asarray(values)
  except ValueError as error:
    raise ConfigError(f'{name} is no array ({error}).') from None
