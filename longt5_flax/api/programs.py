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

from longt5_flax.generation.generate import Generated, generate
from longt5_flax.generation.options import GenerationOptions
from longt5_flax.model import decoding


@partial(jax.jit, static_argnums=(0, 1))
def init(module: nn.Module, inputs: int, key: Array) -> Any:
  """Random parameters of a module that takes one or two arrays of ids."""
  return module.init(key, *inputs * [jnp.zeros((1, 1), jnp.int32)])['params']


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
                         prompt_mask)
  return generate(partial(decoding.step, module, params), decoding.reorder,
                  cache, prompt, options, key)


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
