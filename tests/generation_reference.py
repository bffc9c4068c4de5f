"""Decoding written for reading: lists, one input at a time, no cache.

What transformers 4.57's `generate` computes for each option, in double
precision. `options` has GenerationOptions' attributes. `logits_of(tokens)`
gives the logits [V] of what follows a list of tokens.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

Logits = Callable[[list[int]], np.ndarray]


def generate(logits_of: Logits, prompt: list[int],
             options: Any) -> tuple[list[list[int]], list[float]]:
  """The sequences of one input, filled to max_length, and beams' scores."""
  prompt = [int(token) for token in prompt]
  if options.num_beams == 1:
    tokens = greedy(logits_of, prompt, options)
    return [fill(tokens, options.pad_token_id, options)], []
  best = beam_search(logits_of, prompt, options)
  best = best[:options.num_return_sequences]
  filler = options.pad_token_id or (list(options.eos_token_ids) or [0])[0]
  return ([fill(tokens, filler, options) for _, tokens in best],
          [score for score, _ in best])


def fill(tokens, filler, options):
  return tokens + [filler] * (options.max_length - len(tokens))


def greedy(logits_of, prompt, options):
  tokens = prompt
  while len(tokens) < options.max_length:
    scores = adjust_scores(logits_of(tokens), tokens, options)
    tokens = tokens + [int(np.argmax(scores))]
    if tokens[-1] in options.eos_token_ids:
      break
  return tokens


def beam_search(logits_of, prompt, options):
  """[(score, tokens)], the best first."""
  beams = options.num_beams
  running, ended = [(0.0, prompt)], []
  for length in range(len(prompt) + 1, options.max_length + 1):
    candidates = []
    for total, tokens in running:
      scores = adjust_scores(log_softmax(logits_of(tokens)), tokens, options)
      candidates += [(total + score, [*tokens, token])
                     for token, score in enumerate(scores) if score > -np.inf]
    candidates.sort(key=lambda candidate: -candidate[0])
    running, new = [], length - len(prompt)
    count = beams * max(2, 1 + len(options.eos_token_ids))
    for rank, (total, tokens) in enumerate(candidates[:count]):
      if (tokens[-1] not in options.eos_token_ids
          and length < options.max_length):
        running.append((total, tokens))
      elif rank < beams:
        ended.append((total / new ** options.length_penalty, tokens))
    ended = sorted(ended, key=lambda end: -end[0])[:beams]
    running = running[:beams]
    if len(ended) == beams and running:
      if options.early_stopping is True:
        break
      if options.early_stopping == 'never' and options.length_penalty > 0:
        new = options.max_length - len(prompt)
      if running[0][0] / new ** options.length_penalty <= ended[-1][0]:
        break
  return ended


def log_softmax(logits):
  logits = logits.astype(np.float64)
  logits = logits - logits.max()
  return logits - np.log(np.exp(logits).sum())


def adjust_scores(scores, tokens, options):
  """Of the next token, with what may not come at minus infinity."""
  scores = scores.astype(np.float64)
  if options.repetition_penalty != 1.0:
    for token in set(tokens):
      by = options.repetition_penalty
      scores[token] = scores[token] * (by if scores[token] < 0 else 1 / by)
  size = options.no_repeat_ngram_size
  if size:
    ngrams = [tokens[i:i + size] for i in range(len(tokens) - size + 1)]
    for token in range(len(scores)):
      if (tokens + [token])[-size:] in ngrams:
        scores[token] = -np.inf
  if len(tokens) < options.min_length:
    scores[list(options.eos_token_ids)] = -np.inf
  for token, length in ((options.forced_bos_token_id, 1),
                        (options.forced_eos_token_id, options.max_length - 1)):
    if token is not None and len(tokens) == length:
      scores = np.where(np.arange(len(scores)) == token, 0.0, -np.inf)
  return scores


def restrict_draw(scores, options):
  """By temperature, top-k and top-p."""
  scores = scores.astype(np.float64) / options.temperature
  least = 1 if options.num_beams == 1 else 1 + max(
      1, len(options.eos_token_ids))
  order = list(np.argsort(-scores))
  kept = order[:max(options.top_k, least)] if options.top_k else order
  if options.top_p < 1:
    shares = np.exp(log_softmax(scores[kept]))
    before = np.cumsum(shares) - shares
    kept = [token for rank, token in enumerate(kept)
            if rank < least or before[rank] < options.top_p]
  is_kept = np.isin(np.arange(len(scores)), kept)
  return np.where(is_kept, scores, -np.inf)
