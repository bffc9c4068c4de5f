"""Beam search: several hypotheses for each input, and the best that ended."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.generation.options import GenerationOptions
from longt5_flax.generation.scores import adjust_scores, ends, restrict_draw
from longt5_flax.generation.steps import (
    Reorder,
    Step,
    room_for,
    row_wise,
    token_at,
)

# The score of what is no hypothesis: one that has not been written, or that
# may not be chosen.
_NOT_ONE = -1e9
# Of a row of scores: as many programs of a GPU as look for the largest. A power
# of two, as sizes of vocabularies are multiples of one.
_PARTS = 32


class Hypotheses(NamedTuple):
  """Some hypotheses for each input, the best first."""
  tokens: Int[Array, 'B beams max_length']
  scores: Float[Array, 'B beams']


class _Loop(NamedTuple):
  """State between steps.

  Attributes:
    length: of the running hypotheses.
    running: those that go on; scores are log-probabilities.
    ended: those that have ended; scores as they will be returned.
    is_ended: which of `ended` are there already.
    is_open: inputs whose `ended` may still change.
    cache: of the running hypotheses.
  """
  length: Int[Array, '']
  running: Hypotheses
  ended: Hypotheses
  is_ended: Bool[Array, 'B beams']
  is_open: Bool[Array, 'B']
  cache: Any


def beam_search(
    step: Step,
    reorder: Reorder,
    cache: Any,
    prompt: Int[Array, 'rows P'],
    options: GenerationOptions,
    key: Array | None,
) -> Hypotheses:
  """Decodes each input until no better hypothesis is to be expected.

  At every step the likeliest continuations of all running hypotheses of an
  input are candidates, so many that `num_beams` of them go on however many
  end. One that ends counts only if it is among the first `num_beams`.

  Args:
    step: gives the logits after one more token, and the cache that holds it.
    reorder: picks rows of a cache.
    cache: holds the prompt but for its last token.
    prompt: rows = B * num_beams, those of an input standing together.
    options: with num_beams above 1.
    key: for drawing candidates, where options.do_sample.

  Returns:
    Hypotheses, the best first, filled after their end with `pad_token_id`, or
    with the first EOS if that is 0; and log-probability / tokens **
    length_penalty of each, the prompt not counted.
  """
  beams, prompt_length = options.num_beams, prompt.shape[1]
  # By the number of new tokens, rounded as transformers rounds it.
  penalties = jnp.asarray(
      np.arange(options.max_length).clip(1.0) ** options.length_penalty,
      jnp.float32)

  def body(loop):
    tokens = loop.running.tokens.reshape(len(prompt), -1)
    logits, cache = step(loop.cache, token_at(tokens, loop.length - 1))
    scores = adjust_scores(
        jax.nn.log_softmax(logits), tokens, loop.length, options)
    if options.do_sample:
      scores = restrict_draw(scores, options)
    candidates, parents, does_end = _candidates(loop, scores, options, key)
    length = loop.length + 1
    running, places = _best(candidates._replace(
        scores=candidates.scores + jnp.where(does_end, _NOT_ONE, 0.0)), beams)
    penalty = penalties[length - prompt_length]
    ended, is_ended = _merge(loop, candidates, does_end, penalty)
    if options.early_stopping == 'never' and options.length_penalty > 0:
      penalty = penalties[options.max_length - prompt_length]
    is_open = loop.is_open & _may_improve(running, ended, is_ended, penalty)
    if options.early_stopping is True:
      is_open &= ~jnp.all(is_ended, axis=1)
    rows = _take(parents, places) + np.arange(len(parents))[:, None] * beams
    return _Loop(length, running, ended, is_ended, is_open,
                 reorder(cache, rows.reshape(-1)))

  loop = jax.lax.while_loop(
      lambda loop: (loop.length < options.max_length) & jnp.any(loop.is_open),
      body, _start(cache, prompt, options))
  return loop.ended


def _start(cache, prompt, options):
  fill = options.pad_token_id or (*options.eos_token_ids, 0)[0]
  tokens = room_for(prompt, options.max_length, fill)
  tokens = tokens.reshape(-1, options.num_beams, options.max_length)
  # An input's hypotheses are the same as yet: all but one must not multiply.
  scores = jnp.full(tokens.shape[:2], _NOT_ONE).at[:, 0].set(0.0)
  return _Loop(
      jnp.asarray(prompt.shape[1], jnp.int32), Hypotheses(tokens, scores),
      Hypotheses(tokens, jnp.full_like(scores, _NOT_ONE)),
      jnp.zeros(scores.shape, bool), jnp.ones(len(tokens), bool), cache)


def _candidates(loop, scores, options, key):
  """The likeliest continuations of each input's hypotheses, or so many drawn
  without replacement; with the number of the hypothesis that each continues,
  and whether it ends."""
  vocab_size = scores.shape[1]
  inputs, beams = loop.running.scores.shape
  count = beams * (1 + max(1, len(options.eos_token_ids)))
  scores = loop.running.scores[..., None] + scores.reshape(inputs, beams, -1)
  scores = scores.reshape(inputs, -1)
  if options.do_sample:
    # The largest of scores with Gumbel noise are such a draw.
    noise = row_wise(lambda key, row: jax.random.gumbel(key, row.shape),
                     key, loop.length, scores)
    places = largest(scores + noise, count)[1]
    scores = _take(scores, places)
  else:
    scores, places = largest(scores, count)
  parents, token = places // vocab_size, places % vocab_size
  tokens = _take(loop.running.tokens, parents).at[:, :, loop.length].set(token)
  does_end = ends(token, options) | (loop.length + 1 == options.max_length)
  return Hypotheses(tokens, scores), parents, does_end


def largest(x: Float[Array, 'rows n'], count: int
            ) -> tuple[Float[Array, 'rows count'], Int[Array, 'rows count']]:
  """`jax.lax.top_k`, from those of parts of each row.

  A GPU has one of its many multiprocessors look through a row, so that more
  and shorter rows take a small part of the time. As there, of equal ones those
  that come first are taken: parts keep their order.
  """
  rows, n = x.shape
  parts = math.gcd(n, _PARTS)
  if n // parts < count:
    parts = 1
  best, places = jax.lax.top_k(x.reshape(rows * parts, -1), count)
  firsts = np.arange(parts, dtype=np.int32)[:, None] * (n // parts)
  places = (places.reshape(rows, parts, count) + firsts).reshape(rows, -1)
  best, chosen = jax.lax.top_k(best.reshape(rows, -1), count)
  return best, _take(places, chosen)


def _merge(loop, candidates, does_end, penalty):
  """The best hypotheses that have ended, by now."""
  beams = loop.is_ended.shape[1]
  counts = does_end & loop.is_open[:, None]
  counts &= np.arange(does_end.shape[1]) < beams
  new = candidates._replace(
      scores=jnp.where(counts, candidates.scores / penalty, _NOT_ONE))
  ended, places = _best(jax.tree.map(
      lambda old, new: jnp.concatenate([old, new], axis=1), loop.ended, new),
                        beams)
  return ended, _take(jnp.concatenate([loop.is_ended, counts], 1), places)


def _may_improve(running, ended, is_ended, penalty):
  """Whether the best running hypothesis, at a length of this penalty, would
  be better than the worst that has ended."""
  worst = jnp.min(ended.scores, axis=1, keepdims=True)
  worst = jnp.where(is_ended, worst, _NOT_ONE)
  return jnp.any(running.scores[:, :1] / penalty > worst, axis=1)


def _best(hypotheses, count):
  """The best ones, and which they were."""
  scores, places = jax.lax.top_k(hypotheses.scores, count)
  return Hypotheses(_take(hypotheses.tokens, places), scores), places


def _take(x, places):
  """x[i, places[i]] for every input i."""
  places = places.reshape(places.shape + (1,) * (x.ndim - 2))
  return jnp.take_along_axis(x, places, axis=1)
