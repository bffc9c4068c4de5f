"""What the options do to the scores of the next token, in the order in which
transformers does it.

Scores are logits, or in a beam search log-probabilities. A token that must not
come gets minus infinity.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.generation.options import GenerationOptions


def adjust_scores(
    scores: Float[Array, 'rows V'],
    tokens: Int[Array, 'rows max_length'],
    length: Int[Array, ''],
    options: GenerationOptions,
) -> Float[Array, 'rows V']:
  """Applies penalties, bans and forced tokens.

  Args:
    scores: of the next token.
    tokens: of the sequences so far; what stands from `length` on is not read.
    length: how many there are.
    options: which rules hold.

  Raises:
    GenerationError: if the options name a token outside the vocabulary.
  """
  vocabulary = np.arange(scores.shape[1])
  options.check_tokens(len(vocabulary))
  if options.repetition_penalty != 1.0:
    scores = _penalise_repetition(
        scores, tokens, length, options.repetition_penalty)
  if options.no_repeat_ngram_size > 0:
    scores = _ban_repeated_ngrams(
        scores, tokens, length, options.no_repeat_ngram_size)
  if options.min_length > 0:
    is_end = np.isin(vocabulary, options.eos_token_ids)
    scores = jnp.where(
        is_end & (length < options.min_length), -jnp.inf, scores)
  for token, at in ((options.forced_bos_token_id, 1),
                    (options.forced_eos_token_id, options.max_length - 1)):
    if token is not None:
      forced = np.where(vocabulary == token, np.float32(0), -np.inf)
      scores = jnp.where(length == at, forced, scores)
  return scores


def restrict_draw(
    scores: Float[Array, 'rows V'], options: GenerationOptions
) -> Float[Array, 'rows V']:
  """Applies temperature, top-k and top-p: what sampling draws from."""
  scores = scores / options.temperature
  vocab_size = scores.shape[1]
  # So that a beam search finds a token that does not end the sequence.
  least = 1 if options.num_beams == 1 else 1 + max(
      1, len(options.eos_token_ids))
  likeliest = vocab_size
  if options.top_k:
    likeliest = min(max(options.top_k, least), vocab_size)
    sorted_scores = jax.lax.top_k(scores, likeliest)[0]
    scores = _at_least(sorted_scores[:, -1:], scores)
  if options.top_p < 1:
    if not options.top_k:
      sorted_scores = jax.lax.top_k(scores, likeliest)[0]
    shares = jnp.exp(
        sorted_scores - jax.nn.logsumexp(scores, axis=1, keepdims=True))
    is_kept = jnp.cumsum(shares, axis=1) - shares < options.top_p
    is_kept |= np.arange(likeliest) < least
    scores = _at_least(jnp.min(
        sorted_scores, axis=1, keepdims=True, where=is_kept, initial=jnp.inf),
                       scores)
  return scores


def ends(tokens: Int[Array, '...'],
         options: GenerationOptions) -> Bool[Array, '...']:
  """Which tokens end a sequence."""
  return jnp.isin(tokens, jnp.array(options.eos_token_ids, jnp.int32))


def _at_least(threshold, scores):
  return jnp.where(scores < threshold, -jnp.inf, scores)


def _penalise_repetition(scores, tokens, length, penalty):
  # Places not yet written repeat the first token, which is penalised anyway.
  tokens = jnp.where(
      np.arange(tokens.shape[1]) < length, tokens, tokens[:, :1])
  old = jnp.take_along_axis(scores, tokens, axis=1)
  rows = np.arange(len(tokens))[:, None]
  return scores.at[rows, tokens].set(
      jnp.where(old < 0, old * penalty, old / penalty))


def _ban_repeated_ngrams(scores, tokens, length, size):
  """Bans what followed each earlier place where the last size - 1 tokens
  stand."""
  starts = tokens.shape[1] - size + 1
  if starts < 1:
    return scores
  repeats = np.arange(starts) + size <= length
  for i in range(size - 1):
    last = jax.lax.dynamic_slice_in_dim(
        tokens, length - (size - 1) + i, 1, axis=1)
    repeats &= tokens[:, i:i + starts] == last
  rows = np.arange(len(tokens))[:, None]
  return scores.at[rows, tokens[:, size - 1:]].min(
      jnp.where(repeats, -jnp.inf, jnp.inf))
