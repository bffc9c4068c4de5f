"""LongT5 with its output layer, as transformers 4.57 had it for Flax.

Code written for `transformers.FlaxLongT5ForConditionalGeneration` runs after a
change of its import.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from longt5_flax.api import checks, generation, outputs, programs
from longt5_flax.api.models import FlaxLongT5Model
from longt5_flax.config import ConfigError
from longt5_flax.model.longt5 import LongT5ForConditionalGeneration


class FlaxLongT5ForConditionalGeneration(FlaxLongT5Model):
  """LongT5 with its output layer: gives logits, and writes."""
  module_class = LongT5ForConditionalGeneration
  unused_tensors: ClassVar[tuple[str, ...]] = ()

  _output_class = outputs.FlaxSeq2SeqLMOutput
  _decoder_output_class = outputs.FlaxCausalLMOutputWithCrossAttentions

  def generate(
      self,
      input_ids: checks.Arrays,
      generation_config: Any = None,
      prng_key: jax.Array | None = None,
      trace: bool = True,
      params: Any = None,
      **options: Any,
  ) -> outputs.FlaxGenerateOutput:
    """Writes, token by token: greedily, drawing, or by beam search.

    Inputs are padded to a bucket of lengths, so that one compiled program
    serves all inputs of a bucket; results do not depend on it.

    Args:
      input_ids: [B, L].
      generation_config: GenerationConfig, or a dict of its settings, used
        instead of `self.generation_config`.
      prng_key: for drawing; by default always the same.
      trace: not used.
      params: used instead of what the model holds.
      **options: `attention_mask`, by default 1 for all but padding;
        `decoder_input_ids` [B, P], tokens to go on from, with the start token
        put in front (but not inside jax.jit) if no row begins with it, and
        `decoder_attention_mask` [B, P], 1 for those that later tokens see;
        `encoder_outputs`, what `encode` returned for these inputs; and every
        setting of GenerationConfig (`max_length`, `max_new_tokens`,
        `num_beams`, `do_sample`, ...).

    Returns:
      `sequences`, and `scores` of beams. Every sequence has max_length
      tokens, the start token counted.

    Raises:
      TypeError: an option is unknown.
      ConfigError: an argument cannot work, or asks for what is not there.
      GenerationError: a setting breaks its rule.
    """
    del trace
    return outputs.FlaxGenerateOutput(*programs.write(*self._prepare(
        input_ids, generation_config, prng_key, params, options)))

  def stream(
      self,
      input_ids: checks.Arrays,
      generation_config: Any = None,
      prng_key: jax.Array | None = None,
      params: Any = None,
      **options: Any,
  ) -> Iterator[np.ndarray]:
    """`generate`, but shows each token as it is written.

    Arguments, and what they raise, are those of `generate`; without beams.

    Returns:
      Of arrays [B] int32: the first new token of each row, the second, ...,
      until all rows have ended.
    """
    module, chosen, params, *inputs, key = self._prepare(
        input_ids, generation_config, prng_key, params, options)
    state = programs.write_first(module, chosen, params, *inputs, key)

    def write_rest(written, tokens, goes_on):
      yield np.asarray(tokens)
      while goes_on:
        written, tokens, goes_on = programs.write_next(
            module, chosen, params, written, key)
        yield np.asarray(tokens)

    return write_rest(*state)

  def _prepare(self, input_ids, generation_config, prng_key, params, options):
    """The arguments of `programs.write`."""
    config = self.config
    ids = checks.token_ids('input_ids', input_ids, config.vocab_size)
    given_mask = options.pop('attention_mask', None)
    prompt = options.pop('decoder_input_ids', None)
    prompt_mask = options.pop('decoder_attention_mask', None)
    encoder_outputs = options.pop('encoder_outputs', None)
    settings = generation.merge_settings(
        config, self._defaults(generation_config), options)
    prompt, prompt_mask = self._prompt(
        prompt, prompt_mask, len(ids), settings['decoder_start_token_id'])
    chosen = generation.resolve_options(
        settings, 'max_length' in options, prompt.shape[1])
    if given_mask is None and chosen.pad_token_id not in chosen.eos_token_ids:
      given_mask = ids != chosen.pad_token_id
    mask = checks.attention_mask('attention_mask', given_mask, ids.shape)
    params = self._params_or_held(params)
    encoded, mask = self._encoded_bucket(params, ids, mask, encoder_outputs)
    return (self.module, chosen, params, encoded, mask, prompt, prompt_mask,
            jax.random.key(0) if prng_key is None else prng_key)

  def _encoded_bucket(self, params, ids, mask, encoder_outputs):
    """The encoder's output and mask, in a bucket of lengths."""
    block = self.config.local_radius + 1
    if encoder_outputs is not None:
      return programs.pad_to_bucket(block, checks.encoder_output(
          encoder_outputs, len(ids), self.config.d_model), mask)
    ids, mask = programs.pad_to_bucket(block, ids, mask)
    encoded, _ = programs.apply(
        self.module, 'encode', (), {'params': params}, ids, mask)
    return encoded, mask

  def _defaults(self, generation_config):
    if generation_config is None:
      return self.generation_config
    if isinstance(generation_config, generation.GenerationConfig):
      return generation_config
    if isinstance(generation_config, dict):
      generation.check_names(generation_config)
    elif hasattr(generation_config, 'to_dict'):  # transformers' own.
      generation_config = generation_config.to_dict()
    else:
      raise ConfigError(
          f'generation_config is of type {type(generation_config).__name__}: '
          'must be a GenerationConfig or a dict of its settings.')
    return generation.GenerationConfig.from_dict(generation_config)

  def _prompt(self, prompt, mask, batch_size, start_id):
    """What is decoded from, and which of it is seen; None is all."""
    start = jnp.full((batch_size, 1), start_id, jnp.int32)
    prompt = start if prompt is None else checks.token_ids(
        'decoder_input_ids', prompt, self.config.vocab_size)
    if len(prompt) != batch_size:
      raise ConfigError(f'decoder_input_ids has {len(prompt)} rows: must be '
                        f'{batch_size}, as input_ids.')
    if mask is not None:
      mask = checks.attention_mask(
          'decoder_attention_mask', mask, prompt.shape) > 0
    # As transformers does; inside jit there are no values to look at.
    if checks.has_values(prompt) and not (prompt[:, :1] == start).any():
      prompt = jnp.concatenate([start, prompt], axis=1)
      if mask is not None:
        mask = jnp.pad(mask, ((0, 0), (1, 0)), constant_values=True)
    return prompt, mask


def shift_tokens_right(
    input_ids: checks.Arrays, pad_token_id: int, decoder_start_token_id: int
) -> Int[Array, 'B T']:
  """Decoder inputs of labels: [[5, 6, 1]] gives [[start, 5, 6]].

  Args:
    input_ids: labels [B, T]; -100 marks those that are no target.
    pad_token_id: put in place of -100.
    decoder_start_token_id: put in front.
  """
  labels = jnp.asarray(input_ids, jnp.int32)
  shifted = jnp.roll(labels, 1, axis=-1).at[:, 0].set(decoder_start_token_id)
  return jnp.where(shifted == -100, pad_token_id, shifted)
