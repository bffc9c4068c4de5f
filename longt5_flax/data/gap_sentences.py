"""Gap sentences: PEGASUS's pretraining objective as LongT5 configures it.

Sentences that repeat much of the rest of their document, by ROUGE, become the
target; in the input most of them turn into one mask id.

Source: PEGASUS (Zhang et al. 2020, arXiv 1912.08777) and its operations that
LongT5 calls (Guo et al. 2021, arXiv 2112.07916, section 3.2). Selection is
theirs bit for bit, float32 rounding and quirks included: ties go to the later
sentence, noise depends on a sentence's position only, a newline ends no
sentence, EOS is lost when a sequence is cut. Work is linear in the document's
length, sorts and greedy_rouge apart.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Ids = Sequence[int] | np.ndarray  # of tokens
STRATEGIES = ('random', 'lead', 'rouge', 'dynamic_rouge', 'greedy_rouge',
              'continuous_rouge', 'hybrid', 'none')
METRICS = ('F', 'precision', 'recall')
OPTIONS = ('standard', 'deduplicate', 'log')
# What hybrid draws from, and the id it then puts first in the input.
HYBRID_TASK_IDS = {'random': 5, 'lead': 6, 'rouge': 7}
# C++ library: its random engine's multiplier, its order of a pair of normals.
_NOISE_ENGINES = {'libcxx': (48271, 1), 'libstdcxx': (16807, -1)}
NOISES = (None, *_NOISE_ENGINES)

# One mark before whitespace ends the same sentences as a run of marks would,
# and stays linear: `[.!?]+\s+` is quadratic on a long run of '!'.
_BOUNDARY = re.compile(r'[.!?][ \t\n\v\f\r]+')
# ASCII letters to lower case, digits as they are, any other byte to a space.
_FOLD = bytes(byte if chr(byte).isalnum() and byte < 128 else 32
              for byte in bytes(range(256)).lower())
# Logarithms add up in fixed point: the sum is then the same in every order, so
# that equal overlaps tie. One unit is far below float32's rounding.
_LOG_SCALE = 2.0**40


@dataclasses.dataclass(frozen=True)
class GapSentenceOptions:
  """The whole objective, LongT5's by default. A bad value: ValueError."""

  strategy: str = 'dynamic_rouge'  # one of STRATEGIES
  ratio: float = 0.2  # share of the sentences to select, in (0, 1]
  # dynamic_rouge draws each document's share from ratio * [min_ratio, 1).
  min_ratio: float = 0.33
  ngram: int = 1  # tokens in an n-gram
  metric: str = 'F'  # one of METRICS
  # How counts weigh: as they are, as 0 or 1 ("deduplicate"), as ln(1 + count).
  option: str = 'standard'
  stop_words: Sequence[str] = ()  # lower case; go before n-grams are formed
  # The C++ library whose fixed noise multiplies dynamic_rouge's scores: libcxx
  # (most likely the published checkpoints'), libstdcxx or None.
  noise: str | None = 'libcxx'
  # Applied twice, as published: the multipliers' standard deviation is 0.04.
  noise_ratio: float = 0.2
  mask_id: int = 2  # stands for a masked sentence; <unk> in T5's vocabulary
  # That a selected sentence, in the input, is masked, replaced by a random
  # sentence, left intact, removed. The sum is exactly 1 in float32.
  probabilities: Sequence[float] = (0.9, 0.0, 0.1, 0.0)

  def __post_init__(self) -> None:
    chances = np.asarray(self.probabilities, np.float32)
    rules = {
        'strategy': (self.strategy in STRATEGIES, f'be one of {STRATEGIES}'),
        'metric': (self.metric in METRICS, f'be one of {METRICS}'),
        'option': (self.option in OPTIONS, f'be one of {OPTIONS}'),
        'noise': (self.noise in NOISES, f'be one of {NOISES}'),
        'ratio': (0 < self.ratio <= 1, 'be in (0, 1]'),
        'min_ratio': (0 < self.min_ratio <= 1, 'be in (0, 1]'),
        'ngram': (self.ngram >= 1, 'be 1 or more'),
        'noise_ratio': (self.noise_ratio >= 0, 'be 0 or more'),
        'mask_id': (self.mask_id >= 0, 'be 0 or more'),
        'stop_words': (not isinstance(self.stop_words, str),
                       'be a sequence of words, not one string'),
        'probabilities': (
            chances.shape == (4,) and chances.min() >= 0
            and np.cumsum(chances)[-1] == 1,
            'be four numbers of 0 or more that sum to exactly 1 in float32')}
    for name, (valid, rule) in rules.items():
      if not valid:
        raise ValueError(f'{name}={getattr(self, name)!r} must {rule}.')


def split_sentences(text: str) -> list[str]:
  """Splits after every run of `.!?` and the ASCII whitespace that follows it.

  Nothing is trimmed: the sentences joined are the text, except that a literal
  "[SEP]" separates sentences too and is dropped, as upstream.
  """
  marked = _BOUNDARY.sub(r'\g<0>[SEP]', text)
  return [sentence for sentence in marked.split('[SEP]') if sentence]


def masked_count(num_sentences: int, ratio: float | np.floating) -> int:
  """How many to select: floor(N * ratio) in float32, at least 1, at most N."""
  wanted = np.float32(num_sentences) * np.float32(ratio)
  return min(int(max(wanted, np.float32(1))), num_sentences)


def greedy_sentence_limit(
    ratio: float, inputs_length: int, targets_length: int) -> int:
  """How many leading sentences greedy_rouge selects from; lengths in tokens.

  `eligible` of `select_sentences`, and the most that `masked_count` counts.
  """
  targets = float(np.float32(targets_length) / np.float32(ratio))
  return max(1, int(max(inputs_length / 20, targets / 20)))


class Grams(NamedTuple):
  """The n-grams of a document, counted once."""
  size: int  # N, the eligible sentences
  text: np.ndarray  # [V] int, counts in the whole text
  # [P] int: this sentence holds that n-gram so many times; ascending.
  sentence: np.ndarray
  gram: np.ndarray
  times: np.ndarray


def count_grams(
    sentences: Sequence[str], options: GapSentenceOptions,
    eligible: int | None = None) -> Grams:
  """Counts n-grams of the tokens [a-z0-9]+, after folding ASCII letters."""
  # A character outside ASCII becomes '?': a separator, as its bytes would be.
  words = [sentence.encode('ascii', 'replace').translate(_FOLD).split()
           for sentence in sentences]
  if options.stop_words:
    stopped = {word.encode('ascii', 'replace') for word in options.stop_words}
    words = [[word for word in row if word not in stopped] for row in words]
  sentence = np.repeat(np.arange(len(words)), [len(row) for row in words])
  ids: dict[bytes, int] = collections.defaultdict(itertools.count().__next__)
  flat = itertools.chain.from_iterable(words)
  word = np.fromiter(map(ids.__getitem__, flat), np.int64, len(sentence))
  gram = word
  for n in range(1, options.ngram):
    # Numbered anew at every n: ids of long n-grams would overflow.
    gram = np.unique(gram[:-1] * len(ids) + word[n:], return_inverse=True)[1]
  text = np.bincount(gram)
  size = len(sentences[:eligible])
  first, last = sentence[:len(gram)], sentence[options.ngram - 1:]
  pairs = (first * len(text) + gram)[(first == last) & (last < size)]
  pairs, times = np.unique(pairs, return_counts=True)
  return Grams(size, text, *np.divmod(pairs, max(1, len(text))), times)


def rouge_terms(
    reference: np.ndarray, candidate: np.ndarray, option: str) -> np.ndarray:
  """What each n-gram adds to the sums that `rouge_similarity` takes.

  From counts of the same n-grams, [...] int each, to [3, ...] int64: clipped
  overlap, reference weight, candidate weight. "log" is in fixed point.
  """
  counts = np.stack([reference, candidate]).astype(np.int64)
  if option == 'deduplicate':
    counts = np.minimum(counts, 1)
  elif option == 'log':
    counts = np.rint(np.log(1.0 + counts) * _LOG_SCALE).astype(np.int64)
  return np.concatenate([counts.min(axis=0, keepdims=True), counts])


def rouge_similarity(sums: np.ndarray, metric: str, option: str) -> np.ndarray:
  """[M] float32 from sums [3, M] of terms, by upstream's float32 steps."""
  overlap, reference, candidate = sums
  floor = 0.1 * _LOG_SCALE if option == 'log' else 1.0
  recall = (overlap / np.maximum(floor, reference)).astype(np.float32)
  precision = (overlap / np.maximum(floor, candidate)).astype(np.float32)
  if metric != 'F':
    return recall if metric == 'recall' else precision
  # Not the closed form 2 * overlap / total: it rounds ties differently.
  return np.divide(
      2 * precision * recall, precision + recall,
      out=np.zeros_like(precision), where=(precision > 0) & (recall > 0))


def _sum_by(owner: np.ndarray, terms: np.ndarray, size: int) -> np.ndarray:
  """Sums terms [3, M] by owner [M] to [3, size]; exact below 2**53."""
  sums = [np.bincount(owner, row, size) for row in terms]
  return np.stack(sums).astype(np.int64)


def _scores_of_moves(
    grams: Grams, reference: np.ndarray, candidate: np.ndarray,
    options: GapSentenceOptions) -> np.ndarray:
  """[N] float32: the similarity if this sentence moved to the candidate."""
  terms = functools.partial(rouge_terms, option=options.option)
  r, c = reference[grams.gram], candidate[grams.gram]
  # Only the sentence's own n-grams change: one pass over the pairs does all N.
  # One that moved before has nothing left to move; its score goes unused.
  change = terms(np.maximum(r - grams.times, 0), c + grams.times) - terms(r, c)
  sums = (terms(reference, candidate).sum(axis=1, keepdims=True)
          + _sum_by(grams.sentence, change, grams.size))
  return rouge_similarity(sums, options.metric, options.option)


def sentence_scores(
    sentences: Sequence[str], options: GapSentenceOptions,
    eligible: int | None = None) -> np.ndarray:
  """[N] float32: eligible sentences against all other text, without noise."""
  grams = count_grams(sentences, options, eligible)
  return _scores_of_moves(grams, grams.text, 0 * grams.text, options)


@functools.cache
def noise_table(library: str, size: int, noise_ratio: float) -> np.ndarray:
  """[size] float64: the noise of the first sentences of every document.

  std::normal_distribution over a default engine. Upstream starts it anew for
  each document, so noise depends on a sentence's position and the library.
  """
  multiplier, order = _NOISE_ENGINES[library]
  modulus, span, state = 2**31 - 1, 2.0**31 - 2, 1
  normals: list[float] = []
  while len(normals) < size:
    pair = []
    for _ in range(2):
      low = state * multiplier % modulus
      state = low * multiplier % modulus
      pair.append(2 * ((low - 1 + (state - 1) * span) / (span * span)) - 1)
    square = pair[0] * pair[0] + pair[1] * pair[1]
    if 0 < square <= 1:
      scale = math.sqrt(-2 * math.log(square) / square)
      normals += [x * scale for x in pair[::order]]
  table = np.array(normals[:size]) * float(np.float32(noise_ratio))
  table.setflags(write=False)  # every caller gets the same one
  return table


def add_noise(scores: np.ndarray, options: GapSentenceOptions) -> np.ndarray:
  """[N] float32: scores [N] times 1 + noise_ratio * noise, if there is any."""
  if options.noise is None:
    return scores
  size = max(1024, 1 << len(scores).bit_length())  # few tables serve all
  noise = noise_table(options.noise, size, options.noise_ratio)[:len(scores)]
  noisy = scores * (1 + float(np.float32(options.noise_ratio)) * noise)
  return noisy.astype(np.float32)


def top_sentences(scores: np.ndarray, count: int) -> list[int]:
  """Indices of the best scores [N], ascending; of equals the later ones."""
  order = np.argsort(scores, kind='stable')
  return np.sort(order[len(scores) - count:]).tolist()


def _greedy(grams: Grams, count: int, options: GapSentenceOptions) -> list[int]:
  """Each round adds the sentence that makes the selection score best."""
  remaining, selected = grams.text.copy(), np.zeros_like(grams.text)
  picks: list[int] = []
  for _ in range(count):
    scores = _scores_of_moves(grams, remaining, selected, options)
    scores[picks] = -1
    picks += top_sentences(scores, 1)
    own = slice(*np.searchsorted(grams.sentence, [picks[-1], picks[-1] + 1]))
    remaining[grams.gram[own]] -= grams.times[own]
    selected[grams.gram[own]] += grams.times[own]
  return sorted(picks)


def _continuous(grams: Grams, count: int, options: GapSentenceOptions
                ) -> list[int]:
  """The window of `count` sentences that scores best against the rest.

  Sentence s enters at window s - count + 1 and leaves at window s + 1. These
  events in order of n-gram and window give all changes of the sums at once.
  """
  terms = functools.partial(rouge_terms, option=options.option)
  window = np.concatenate(
      [np.maximum(grams.sentence - count + 1, 0), grams.sentence + 1])
  gram = np.tile(grams.gram, 2)
  order = np.lexsort((window, gram))
  enters = np.concatenate([grams.times, -grams.times])[order]
  # What enters leaves, so the sum is back at 0 where the next n-gram begins.
  inside = np.cumsum(enters)
  outside = grams.text[gram[order]] - inside
  change = terms(outside, inside) - terms(outside + enters, inside - enters)
  sums = (terms(grams.text, 0 * grams.text).sum(axis=1, keepdims=True)
          + np.cumsum(_sum_by(window[order], change, grams.size + 1), axis=1))
  scores = rouge_similarity(sums, options.metric, options.option)
  first, = top_sentences(scores[:grams.size - count + 1], 1)
  return list(range(first, first + count))


def draw_hybrid_strategy(rng: np.random.Generator) -> str:
  """One of `HYBRID_TASK_IDS`, each as likely."""
  return list(HYBRID_TASK_IDS)[rng.integers(len(HYBRID_TASK_IDS))]


def select_sentences(
    sentences: Sequence[str], count: int, *, strategy: str,
    rng: np.random.Generator | None = None, eligible: int | None = None,
    **scoring: Any) -> list[int]:
  """Selects `count` sentences of a document: ascending indices.

  Args:
    sentences: the whole document in order; each is scored against all of it.
    count: how many to select; see `masked_count`. "none" selects none.
    strategy: one of `STRATEGIES`; "hybrid" follows `draw_hybrid_strategy`.
    rng: needed by "random" and "hybrid".
    eligible: select from so many leading sentences only (None: from all).
    **scoring: ngram, metric, option, stop_words, noise (here None by default)
      and noise_ratio; see `GapSentenceOptions`.

  Raises:
    ValueError: a bad option, too large a `count`, or no rng.
  """
  options = GapSentenceOptions(strategy, **{'noise': None, **scoring})
  limit = len(sentences[:eligible])
  if not 0 <= count <= limit:
    raise ValueError(f'{count=} must be in [0, {limit}].')
  if strategy in ('random', 'hybrid'):
    if rng is None:
      raise ValueError(f'{strategy=} needs rng, a numpy Generator.')
    if strategy == 'hybrid':
      strategy = draw_hybrid_strategy(rng)
    if strategy == 'random':
      return np.sort(rng.permutation(limit)[:count]).tolist()
  if strategy == 'none':
    return []
  if strategy == 'lead':
    return list(range(count))
  if strategy in ('greedy_rouge', 'continuous_rouge'):
    grams = count_grams(sentences, options, limit)
    search = _greedy if strategy == 'greedy_rouge' else _continuous
    return search(grams, count, options)
  scores = sentence_scores(sentences, options, limit)
  if strategy == 'dynamic_rouge':
    scores = add_noise(scores, options)
  return top_sentences(scores, count)


def _replace(
    ids: Sequence[Ids], picks: list[int], options: GapSentenceOptions,
    rng: np.random.Generator) -> list[Ids]:
  """The document with its picked sentences masked, swapped, kept or gone."""
  now = list(ids)
  mask, swap, keep, _ = np.cumsum(options.probabilities, dtype=np.float32)
  for pick in picks:
    # Rounded to float32 first, as upstream; should 1.0 come out, it removes.
    draw = np.float32(rng.random())
    if draw < mask:
      now[pick] = [options.mask_id]
    elif draw < swap:
      now[pick] = now[rng.integers(len(now))]
    elif draw >= keep:
      now[pick] = []
  return now


def _cut(pieces: list[Ids], length: int) -> np.ndarray:
  ids = itertools.chain.from_iterable(pieces)
  return np.fromiter(itertools.islice(ids, length), np.int32)


def gap_sentence_example(
    sentences: Sequence[str], sentence_ids: Sequence[Ids],
    options: GapSentenceOptions, rng: np.random.Generator,
    inputs_length: int, targets_length: int, eos_id: int = 1,
) -> tuple[np.ndarray, np.ndarray, int]:
  """Makes one training example of a document.

  Args:
    sentences: the document in order, as `split_sentences` gives it.
    sentence_ids: one each (or ValueError): token ids, tokenised on its own.
    options: the objective.
    rng: decides everything random; same state, same example.
    inputs_length, targets_length: the most ids that remain of either.
    eos_id: appended BEFORE a sequence is cut, so a cut one ends without it.

  Returns:
    Input ids, target ids (int32, unpadded), and how many ids of the target
    were cut, EOS included.
  """
  if len(sentences) != len(sentence_ids):
    raise ValueError(f'{len(sentence_ids)=} must equal {len(sentences)=}.')
  strategy, ratio, eligible = options.strategy, options.ratio, len(sentences)
  task: list[Ids] = []
  if strategy == 'hybrid':
    strategy = draw_hybrid_strategy(rng)
    task = [[HYBRID_TASK_IDS[strategy]]]
  elif strategy == 'dynamic_rouge':
    low = float(np.float32(options.min_ratio))
    ratio = float(np.float32(ratio)) * rng.uniform(low, 1.0)
  elif strategy == 'greedy_rouge':
    limit = greedy_sentence_limit(ratio, inputs_length, targets_length)
    eligible = min(eligible, limit)
  picks = select_sentences(
      sentences, masked_count(eligible, ratio), rng=rng, eligible=eligible,
      **{**vars(options), 'strategy': strategy})
  targets = [sentence_ids[pick] for pick in picks] + [[eos_id]]
  inputs = task + _replace(sentence_ids, picks, options, rng) + [[eos_id]]
  lost = max(0, sum(map(len, targets)) - targets_length)
  return _cut(inputs, inputs_length), _cut(targets, targets_length), lost
