"""What the modules take as inputs besides JAX arrays under seqio's names."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

# Hugging Face's names; a mask is one segment.
_NAMES = {
    'input_ids': 'encoder_input_tokens',
    'attention_mask': 'encoder_segment_ids',
    'encoder_attention_mask': 'encoder_segment_ids',
    'decoder_input_ids': 'decoder_input_tokens',
    'decoder_attention_mask': 'decoder_mask',
}
_MASK_DTYPES = {'encoder_segment_ids': jnp.int32, 'decoder_mask': jnp.bool_}


def flexible_inputs(method: Callable[..., Any]) -> Callable[..., Any]:
  """Lets a method of a module take NumPy arrays, and its arguments by Hugging
  Face's names: `input_ids`, `attention_mask`, `decoder_input_ids`,
  `decoder_attention_mask`, `encoder_attention_mask`.

  Raises:
    TypeError: when called with an argument under both names.
  """

  @functools.wraps(method)
  def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
    for theirs, ours in _NAMES.items():
      if theirs in kwargs:
        if ours in kwargs:
          raise TypeError(f'{theirs} and {ours} are one argument.')
        value = kwargs.pop(theirs)
        if value is not None and ours in _MASK_DTYPES:
          value = (jnp.asarray(value) > 0).astype(_MASK_DTYPES[ours])
        kwargs[ours] = value
    return method(self, *map(_to_jax, args),
                  **{name: _to_jax(value) for name, value in kwargs.items()})

  return wrapped


def _to_jax(value):
  return jnp.asarray(value) if isinstance(value, np.ndarray) else value
