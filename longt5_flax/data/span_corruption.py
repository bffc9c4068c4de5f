"""Span corruption: T5's pretraining objective.

Random spans of a text are replaced by sentinels, a different one each; the
target is those spans, each behind its sentinel. For the text a b c d e f g
with the spans c d and g, EOS as 1:

  inputs   a b <extra_id_0> e f <extra_id_1> 1
  targets  <extra_id_0> c d <extra_id_1> g 1

Source: T5 (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4) and its
preprocessors: as many spans, of lengths from the same distribution, cut from a
text of the length that makes the inputs as long as they may be.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Ids = Sequence[int] | np.ndarray  # of tokens


@dataclasses.dataclass(frozen=True)
class SpanCorruptionOptions:
  """The whole objective, T5's by default. A bad value: ValueError."""

  noise_density: float = 0.15  # share of the tokens that goes to the targets
  mean_noise_span_length: float = 3.0  # in tokens

  def __post_init__(self) -> None:
    rules = {
        'noise_density': (0 < self.noise_density < 1, 'be in (0, 1)'),
        'mean_noise_span_length': (
            1 <= self.mean_noise_span_length < float('inf'),
            'be 1 or more and finite')}
    for name, (valid, rule) in rules.items():
      if not valid:
        raise ValueError(f'{name}={getattr(self, name)!r} must {rule}.')


def noise_counts(
    num_tokens: int, options: SpanCorruptionOptions) -> tuple[int, int]:
  """How many of 2 or more tokens are noise, and in how many spans.

  T5 multiplies in float32, and so hides a token more of one length in a
  hundred, such as 190.
  """
  noise = round(num_tokens * options.noise_density)
  noise = min(max(noise, 1), num_tokens - 1)
  spans = max(round(noise / options.mean_noise_span_length), 1)
  # A span of text before each: only so many fit.
  return noise, min(spans, num_tokens - noise)


def span_lengths(
    inputs_length: int, options: SpanCorruptionOptions) -> tuple[int, int]:
  """The longest text whose corrupted inputs fit a length.

  Args:
    inputs_length: 3 or more, sentinels and EOS included.
    options: the objective.

  Returns:
    The text's length, and that of its targets, sentinels and EOS included. The
    inputs are then exactly `inputs_length` long, unless more than about half of
    the tokens are noise in very short spans.
  """
  num_tokens = max(2, inputs_length - 1)
  while True:
    noise, spans = noise_counts(num_tokens + 1, options)
    if num_tokens + 1 - noise + spans + 1 > inputs_length:
      break
    num_tokens += 1
  noise, spans = noise_counts(num_tokens, options)
  return num_tokens, noise + spans + 1


def _random_segments(
    total: int, count: int, rng: np.random.Generator) -> np.ndarray:
  """[count] lengths of at least 1 with this sum, all such as likely."""
  cuts = 1 + np.sort(rng.permutation(total - 1)[:count - 1])
  return np.diff(cuts, prepend=0, append=total)


def noise_mask(num_tokens: int, options: SpanCorruptionOptions,
               rng: np.random.Generator) -> np.ndarray:
  """[num_tokens] bool: which tokens are noise. The first one is not."""
  # T5's way with texts of one token: the mask of two, cut.
  length = max(num_tokens, 2)
  noise, spans = noise_counts(length, options)
  noise_lengths = _random_segments(noise, spans, rng)
  text_lengths = _random_segments(length - noise, spans, rng)
  lengths = np.stack([text_lengths, noise_lengths], axis=1).ravel()
  return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)[:num_tokens]


def _hide(ids: np.ndarray, hidden: np.ndarray, sentinel_ids: np.ndarray,
          eos_id: int) -> np.ndarray:
  """The ids, each hidden span as its sentinel, and EOS."""
  first = hidden & ~np.append(False, hidden[:-1])
  marked = ids.copy()
  marked[first] = sentinel_ids[:np.count_nonzero(first)]
  return np.append(marked[first | ~hidden], np.int32(eos_id))


def span_corruption_example(
    ids: Ids, options: SpanCorruptionOptions, rng: np.random.Generator,
    sentinel_ids: Ids, eos_id: int = 1) -> tuple[np.ndarray, np.ndarray]:
  """Makes one training example of a text.

  Args:
    ids: [n] token ids of the text, without EOS; all of it is used.
    options: the objective.
    rng: decides everything random; same state, same example.
    sentinel_ids: stand for the spans, in this order: `Vocabulary.sentinel_ids`.
      At least as many as `noise_counts` says.
    eos_id: ends both sides.

  Returns:
    Input ids and target ids (int32). No text gives EOS alone; a single token
    stays in the inputs.
  """
  text = np.asarray(ids, np.int32)
  sentinels = np.asarray(sentinel_ids, np.int32)
  noise = noise_mask(len(text), options, rng)
  return (_hide(text, noise, sentinels, eos_id),
          _hide(text, ~noise, sentinels, eos_id))
