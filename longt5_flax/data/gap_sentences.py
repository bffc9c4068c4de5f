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

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from longt5_flax.data.documents import (
    Document,
    TokenizedDocument,
    Words,
    count_words,
    ends_of,
)
from longt5_flax.data.noise import NOISES, add_noise

Ids = Sequence[int] | np.ndarray  # of tokens
STRATEGIES = ('random', 'lead', 'rouge', 'dynamic_rouge', 'greedy_rouge',
              'continuous_rouge', 'hybrid', 'none')
METRICS = ('F', 'precision', 'recall')
OPTIONS = ('standard', 'deduplicate', 'log')
# What hybrid draws from, and the id it then puts first in the input.
HYBRID_TASK_IDS = {'random': 5, 'lead': 6, 'rouge': 7}

# Logarithms add up in fixed point: the sum is then the same in every order, so
# that equal overlaps tie. One unit is far below float32's rounding.
_LOG_SCALE = 2.0**40
# What may stand in a sentence's place, besides another sentence.
_MASK, _NOTHING = -1, -2


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
    sentences: Sequence[str] | Words, options: GapSentenceOptions,
    eligible: int | None = None) -> Grams:
  """Counts the n-grams of sentences, or of words that were counted before."""
  words = sentences if isinstance(sentences, Words) else count_words(
      sentences, options.stop_words)
  gram, size = words.ids, words.size
  for n in range(1, options.ngram):
    # Numbered anew at every n: ids of long n-grams would overflow.
    gram = np.unique(gram[:-1] * size + words.ids[n:], return_inverse=True)[1]
  text = np.bincount(gram)
  eligible = len(range(len(words))[:eligible])
  sentence = np.repeat(np.arange(len(words)), np.diff(words.ends))
  first, last = sentence[:len(gram)], sentence[options.ngram - 1:]
  inside = (first == last) & (last < eligible)
  pairs, times = np.unique(
      first[inside] * len(text) + gram[inside], return_counts=True)
  return Grams(eligible, text, *np.divmod(pairs, max(1, len(text))), times)


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
    sentences: Sequence[str] | Words, options: GapSentenceOptions,
    eligible: int | None = None) -> np.ndarray:
  """[N] float32: eligible sentences against all other text, without noise."""
  grams = count_grams(sentences, options, eligible)
  return _scores_of_moves(grams, grams.text, 0 * grams.text, options)


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
  words = count_words(sentences, options.stop_words)
  document = TokenizedDocument(words.ids, words.ends, words)
  return _select(document, range(len(words)), count, options, rng, eligible)


def _select(
    document: Document, part: range, count: int, options: GapSentenceOptions,
    rng: np.random.Generator | None, eligible: int | None) -> list[int]:
  """`select_sentences` of the sentences `part`, counted from its first."""
  limit, strategy = len(part[:eligible]), options.strategy
  if not 0 <= count <= limit:
    raise ValueError(f'{count=} must be in [0, {limit}].')
  if strategy in ('random', 'hybrid'):
    if rng is None:
      raise ValueError(f'{strategy=} needs rng, a numpy Generator.')
    if strategy == 'hybrid':
      strategy = draw_hybrid_strategy(rng)
    if strategy == 'random':
      return np.sort(rng.permutation(limit)[:count]).tolist()
  if strategy in ('lead', 'none'):
    return list(range(count if strategy == 'lead' else 0))
  words = document.words.part(part.start, part.stop)
  if strategy in ('greedy_rouge', 'continuous_rouge'):
    search = _greedy if strategy == 'greedy_rouge' else _continuous
    return search(count_grams(words, options, limit), count, options)
  scores = document.scores
  if scores is None or limit < len(document):
    scores = sentence_scores(words, options, limit)
  if strategy == 'dynamic_rouge':
    scores = add_noise(scores, options.noise, options.noise_ratio)
  return top_sentences(scores, count)


def _draw_instead(
    picks: Sequence[int], size: int, options: GapSentenceOptions,
    rng: np.random.Generator) -> dict[int, int]:
  """What stands for picked sentences: the index of one, _MASK or _NOTHING."""
  now: dict[int, int] = {}
  mask, swap, keep, _ = np.cumsum(options.probabilities, dtype=np.float32)
  for pick in picks:
    # Rounded to float32 first, as upstream; should 1.0 come out, it removes.
    draw = np.float32(rng.random())
    if draw < mask:
      now[pick] = _MASK
    elif draw < swap:
      other = int(rng.integers(size))
      now[pick] = now.get(other, other)
    elif draw >= keep:
      now[pick] = _NOTHING
  return now


def _masked(
    document: Document, part: range, now: dict[int, int], mask_id: int,
    most: int) -> Iterator[np.ndarray]:
  """The document with what stands `now` for its sentences, run by run."""
  place, mask = part.start, np.array([mask_id], np.int32)
  for pick, other in now.items():
    yield document.tokens(place, part[pick], most)
    place = part[pick] + 1
    if other == _MASK:
      yield mask
    elif other != _NOTHING:
      yield document.tokens(part[other], part[other] + 1, most)
  yield document.tokens(place, part.stop, most)


def _cut(pieces: Iterable[np.ndarray], length: int) -> np.ndarray:
  kept, size = [], 0
  for piece in pieces:
    kept.append(piece)
    size += len(piece)
    if size >= length:
      break
  return np.concatenate(kept)[:length].astype(np.int32)


def mask_gap_sentences(
    document: Document, part: range, options: GapSentenceOptions,
    rng: np.random.Generator, lengths: tuple[int, int], eos_id: int = 1,
) -> tuple[np.ndarray, np.ndarray, int]:
  """`gap_sentence_example` of the sentences `part` of a document.

  Args:
    document: its `words` without the options' stop words, and its `scores`, if
      it has any, by the options.
    part: consecutive sentences, which are scored as if they were all.
    options, rng, eos_id: see `gap_sentence_example`.
    lengths: the most ids that remain of inputs and of targets.
  """
  ratio, eligible = options.ratio, len(part)
  task = np.zeros(0, np.int32)
  if options.strategy == 'hybrid':
    options = dataclasses.replace(options, strategy=draw_hybrid_strategy(rng))
    task = np.array([HYBRID_TASK_IDS[options.strategy]], np.int32)
  elif options.strategy == 'dynamic_rouge':
    low = float(np.float32(options.min_ratio))
    ratio = float(np.float32(ratio)) * rng.uniform(low, 1.0)
  elif options.strategy == 'greedy_rouge':
    eligible = min(eligible, greedy_sentence_limit(ratio, *lengths))
  picks = _select(
      document, part, masked_count(eligible, ratio), options, rng, eligible)
  now = _draw_instead(picks, len(part), options, rng)
  eos = np.array([eos_id], np.int32)
  targets = [document.tokens(part[pick], part[pick] + 1) for pick in picks]
  inputs = _masked(document, part, now, options.mask_id, lengths[0])
  lost = max(0, sum(map(len, targets)) + 1 - lengths[1])
  return (_cut(itertools.chain([task], inputs, [eos]), lengths[0]),
          _cut([*targets, eos], lengths[1]), lost)


def gap_sentence_example(
    sentences: Sequence[str], sentence_ids: Sequence[Ids],
    options: GapSentenceOptions, rng: np.random.Generator,
    inputs_length: int, targets_length: int, eos_id: int = 1,
) -> tuple[np.ndarray, np.ndarray, int]:
  """Makes one training example of a document.

  Args:
    sentences: the document in order, as `documents.split_sentences` gives it.
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
  document = TokenizedDocument(
      np.fromiter(itertools.chain.from_iterable(sentence_ids), np.int32),
      ends_of(sentence_ids), count_words(sentences, options.stop_words))
  return mask_gap_sentences(
      document, range(len(sentences)), options, rng,
      (inputs_length, targets_length), eos_id)
