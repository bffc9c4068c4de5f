"""The compiled programs of the models, and the lengths they are compiled for.

jax.jit keeps one program for each module, options and shapes. Inside a user's
own jax.jit they are part of that.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.generation.generate import Generated, begin, generate
from longt5_flax.generation.options import GenerationOptions
from longt5_flax.generation.sampling import Written, add_token, is_open
from longt5_flax.generation.steps import token_at
from longt5_flax.interop.layers import init_params
from longt5_flax.model import decoding


@partial(jax.jit, static_argnums=(0, 1))
def init(module: nn.Module, inputs: int, key: Array) -> Any:
  """Random parameters of a module that takes one or two arrays of ids."""
  return init_params(module, key, inputs)


@partial(jax.jit, static_argnums=(0, 1, 2))
def apply(
    module: nn.Module, method: str, collections: tuple[str, ...],
    variables: Any, *args: Any, dropout_key: jax.Array | None = None,
) -> tuple[Any, Any]:
  """A method of a pure module; with dropout if there is a key for it.

  Args:
    module: whose method.
    method: its name.
    collections: of variables that are returned.
    variables: `params`, and what else the method reads.
    *args: of the method.
    dropout_key: None is no dropout.

  Returns:
    What the method returns, and the collections.
  """
  options: dict[str, Any] = {}
  if dropout_key is not None:
    options = {'deterministic': False, 'rngs': {'dropout': dropout_key}}
  return module.apply(
      variables, *args, method=method, mutable=list(collections), **options)


@partial(jax.jit, static_argnums=(0, 1))
def init_cache(module: nn.Module, max_length: int, params: Any,
               encoded: Float[Array, 'B L D']) -> Any:
  """The collections for decoding step by step."""
  return module.apply({'params': params}, encoded, max_length,
                      method='init_cache', mutable=['encoded', 'cache'])[1]


@partial(jax.jit, static_argnums=(0, 1))
def write(
    module: nn.Module, options: GenerationOptions, params: Any,
    encoded: Float[Array, 'B L D'], attention_mask: Int[Array, 'B L'],
    prompt: Int[Array, 'B P'], prompt_mask: Bool[Array, 'B P'] | None,
    key: Array,
) -> Generated:
  """All of decoding; apart from `apply`, so that one program of the encoder
  serves all options."""
  cache = decoding.start(module, params, encoded, attention_mask,
                         options.max_length - 1, options.rows_per_input,
                         prompt_mask, options.num_beams > 1)
  return generate(partial(decoding.step, module, params), decoding.reorder,
                  cache, prompt, options, key)


@partial(jax.jit, static_argnums=(0, 1))
def write_first(
    module: nn.Module, options: GenerationOptions, params: Any,
    encoded: Float[Array, 'B L D'], attention_mask: Int[Array, 'B L'],
    prompt: Int[Array, 'B P'], prompt_mask: Bool[Array, 'B P'] | None,
    key: Array,
) -> tuple[Written, Int[Array, 'B'], Bool[Array, '']]:
  """`write` up to its first token of each row.

  Returns:
    What `write_next` goes on from, the tokens, and whether there are more.
  """
  cache = decoding.start(module, params, encoded, attention_mask,
                         options.max_length - 1, options.rows_per_input,
                         prompt_mask, may_reorder=False)
  step = partial(decoding.step, module, params)
  return _one_more(step, begin(step, cache, prompt, options, key), options, key)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def write_next(module: nn.Module, options: GenerationOptions, params: Any,
               written: Written, key: Array
               ) -> tuple[Written, Int[Array, 'B'], Bool[Array, '']]:
  """One more token of each row; takes the memory of `written`, which must not
  be used again. Returns what `write_first` does."""
  step = partial(decoding.step, module, params)
  return _one_more(step, written, options, key)


def _one_more(step, written, options, key):
  written = add_token(step, written, options, key)
  tokens = token_at(written.tokens, written.length - 1)[:, 0]
  return written, tokens, is_open(written, options)


def bucket_length(length: int, block: int) -> int:
  """The length that inputs of `length` tokens are padded to.

  A power of two or one of the three lengths that divide the space to the next
  one evenly, so that few programs are compiled and at most a quarter of the
  work is padding. Below 8 blocks it is the next whole block, to which local
  attention pads anyway.
  """
  step = max(block, 2 ** max(0, (length - 1).bit_length() - 3))
  return -(-length // step) * step


def pad_to_bucket(block: int, *arrays: Array) -> list[Array]:
  """Arrays [B, L, ...], padded with zeros to the bucket of their length."""
  padding = bucket_length(arrays[0].shape[1], block) - arrays[0].shape[1]
  return [jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
          for x in arrays]
