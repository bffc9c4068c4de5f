"""Decoding, by the method that the options ask for."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from longt5_flax.generation.beam_search import beam_search
from longt5_flax.generation.options import GenerationError, GenerationOptions
from longt5_flax.generation.sampling import Written, sample, start
from longt5_flax.generation.steps import Reorder, Step


class Generated(NamedTuple):
  """What was written.

  Attributes:
    sequences: tokens, the prompt first; the results of an input stand
      together, the best first.
    scores: of a beam search: log-probability / tokens ** length_penalty of
      each sequence, EOS counted and the prompt not. Else None.
  """
  sequences: Int[Array, 'results max_length']
  scores: Float[Array, 'results'] | None


def generate(
    step: Step,
    reorder: Reorder,
    cache: Any,
    prompt: Int[Array, 'B P'],
    options: GenerationOptions,
    key: Array | None = None,
) -> Generated:
  """Decodes a batch: greedily, by sampling, or by beam search.

  One loop without a look at the host, that stops when all rows are done; to be
  called inside `jax.jit`, options being static. No row depends on another. The
  tokens are those of transformers 4.57's `generate` on PyTorch; what is drawn
  differs, its distribution does not. After its end a greedy or drawn row holds
  `pad_token_id`, a beam search's the same or, if that is 0, the first EOS.

  Args:
    step: (cache, tokens [rows, T]) -> (float32 logits after the last token
      [rows, V], cache). rows = B * options.rows_per_input; an input's rows
      stand together.
    reorder: (cache, row numbers [rows]) -> the cache of those rows. Rows stay
      with their input.
    cache: of the inputs, with room for options.max_length - 1 tokens.
    prompt: what each sequence starts with: `start_tokens`, or more.
    options: what to do.
    key: from jax.random, for sampling.

  Raises:
    GenerationError: if the prompt leaves no room, a token is outside the
      vocabulary, or a key is missing.
  """
  rows, cache = _read_prompt(step, cache, prompt, options, key)
  if options.num_beams == 1:
    return Generated(sample(step, cache, rows, options, key), None)
  best = beam_search(step, reorder, cache, rows, options, key)
  count = options.num_return_sequences
  return Generated(
      best.tokens[:, :count].reshape(-1, options.max_length),
      best.scores[:, :count].reshape(-1))


def begin(step: Step, cache: Any, prompt: Int[Array, 'B P'],
          options: GenerationOptions, key: Array | None = None) -> Written:
  """What `sampling.add_token` goes on from, for who wants to see each token.

  Adding tokens while `sampling.is_open` gives the sequences of `generate`,
  whose arguments these are.

  Raises:
    GenerationError: as `generate`; or several beams are asked for, of which no
      token is certain before the end.
  """
  if options.num_beams > 1:
    raise GenerationError(f'num_beams={options.num_beams} must be 1 for tokens '
                          'one at a time.')
  rows, cache = _read_prompt(step, cache, prompt, options, key)
  return start(cache, rows, options)


def _read_prompt(step, cache, prompt, options, key):
  """The prompt of each row, and the cache that holds all but its end."""
  length = prompt.shape[1]
  if not 0 < length < options.max_length:
    raise GenerationError(
        f'max_length={options.max_length} must be greater than the length of '
        f'the prompt, {length}, and that at least 1.')
  if options.do_sample and key is None:
    raise GenerationError('do_sample=True must come with a random key.')
  rows = jnp.repeat(prompt.astype(jnp.int32), options.rows_per_input, axis=0)
  if length > 1:
    _, cache = step(cache, rows[:, :-1])
  return rows, cache


def start_tokens(batch_size: int,
                 options: GenerationOptions) -> Int[Array, 'B 1']:
  """The prompt of inputs that come without one."""
  return jnp.full((batch_size, 1), options.decoder_start_token_id, jnp.int32)
