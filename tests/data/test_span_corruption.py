"""longt5_flax.data.span_corruption against a slow reading of T5's paper."""

import collections
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longt5_flax.data.sources import DataError
from longt5_flax.data.span_corruption import (
    SpanCorruptionOptions,
    noise_counts,
    noise_mask,
    span_corruption_example,
    span_lengths,
)
from longt5_flax.data.vocabulary import Vocabulary

T5 = SpanCorruptionOptions()
EOS = 1
SENTINELS = np.arange(9999, 8999, -1)
TINY = str(Path(__file__).parent.parent / 'testdata/vocabulary/tiny.model')

lengths = st.integers(0, 700)
seeds = st.integers(0, 2**32)
options = st.builds(SpanCorruptionOptions, st.floats(0.02, 0.98),
                    st.floats(1.0, 12.0))


def corrupt(ids, settings=T5, seed=0):
  return span_corruption_example(
      ids, settings, np.random.default_rng(seed), SENTINELS, EOS)


def spelled_out(ids, noise):
  """Inputs and targets of a mask, a token at a time."""
  inputs, targets, sentinels = [], [], iter(SENTINELS)
  hidden = shown = None  # The sentinel of the span that is being read.
  others = iter(SENTINELS)
  for token, is_noise in zip(ids, noise, strict=True):
    if is_noise:
      shown = None
      if hidden is None:
        hidden = next(sentinels)
        inputs.append(hidden)
      targets.append(token)
    else:
      hidden = None
      if shown is None:
        shown = next(others)
        targets.append(shown)
      inputs.append(token)
  return [*inputs, EOS], [*targets, EOS]


@given(lengths, seeds, options)
def test_equals_the_mask_spelled_out(length, seed, settings):
  ids = np.arange(10, 10 + length)
  noise = noise_mask(length, settings, np.random.default_rng(seed))
  inputs, targets = corrupt(ids, settings, seed)
  expected = spelled_out(ids, noise)
  np.testing.assert_array_equal(inputs, expected[0])
  np.testing.assert_array_equal(targets, expected[1])
  assert inputs.dtype == targets.dtype == np.int32


def spans(side):
  """Sentinel -> the tokens behind it; None: those before the first."""
  found, last = {None: []}, None
  for token in side[:-1].tolist():
    if token in SENTINELS:
      last = token
      found[last] = []
    else:
      found[last].append(token)
  return found


@given(st.integers(2, 700), seeds, options)
def test_both_sides_together_are_the_text(length, seed, settings):
  ids = list(range(10, 10 + length))
  inputs, targets = corrupt(ids, settings, seed)
  shown, hidden = spans(inputs), spans(targets)
  used = SENTINELS[:len(shown) - 1].tolist()
  assert list(shown) == list(hidden) == [None, *used]
  assert hidden[None] == []
  between = [shown[None], *(shown[name] for name in used)]
  assert list(itertools.chain.from_iterable(
      text + (hidden[name] if name else [])
      for text, name in zip(between, [*used, None], strict=True))) == ids
  # Text first, then a span and text in turn, a span last.
  assert all(between[:-1])
  assert between[-1] == []
  assert all(hidden[name] for name in used)


@given(st.integers(2, 5000), options)
def test_noise_counts(length, settings):
  noise, count = noise_counts(length, settings)
  assert abs(noise - length * settings.noise_density) <= 1
  assert 1 <= noise < length
  wanted = noise / settings.mean_noise_span_length
  assert 1 <= count <= max(1, wanted + 0.5)
  assert count <= length - noise
  mask = noise_mask(length, settings, np.random.default_rng(0))
  assert mask.sum() == noise
  assert np.sum(mask & ~np.append(False, mask[:-1])) == count


@pytest.mark.parametrize('inputs_length, expected', [
    # Published: 512 -> 114 of T5, 4096 -> 910 of LongT5.
    (512, (568, 114)), (1024, (1137, 229)), (4096, (4550, 910)), (3, (2, 3))])
def test_published_lengths(inputs_length, expected):
  assert span_lengths(inputs_length, T5) == expected


@pytest.mark.parametrize('settings', [
    T5, SpanCorruptionOptions(0.15, 8.0), SpanCorruptionOptions(0.5, 3.0),
    SpanCorruptionOptions(0.4, 1.0)])
def test_inputs_fill_up_exactly(settings):
  for inputs_length in (*range(3, 300), 511, 512, 513, 1024, 4095, 4096, 16384):
    size, targets_length = span_lengths(inputs_length, settings)
    inputs, targets = span_corruption_example(
        np.arange(size), settings, np.random.default_rng(0),
        np.arange(10**6, 10**6 - size, -1), EOS)
    assert (len(inputs), len(targets)) == (inputs_length, targets_length)
    noise, count = noise_counts(size + 1, settings)
    assert size + 1 - noise + count + 1 > inputs_length


@given(st.integers(3, 500), options)
@settings(max_examples=200)
def test_inputs_never_too_long(inputs_length, settings):
  size, targets_length = span_lengths(inputs_length, settings)
  inputs, targets = span_corruption_example(
      np.arange(size), settings, np.random.default_rng(0),
      np.arange(10**6, 10**6 - 600, -1), EOS)
  assert len(inputs) <= inputs_length
  assert len(targets) == targets_length


def test_spans_of_every_shape_are_as_likely():
  """10 tokens, 4 of them noise in 2 spans: 3 x 5 masks."""
  settings = SpanCorruptionOptions(0.4, 2.0)
  rng = np.random.default_rng(0)
  counts = collections.Counter(
      tuple(noise_mask(10, settings, rng)) for _ in range(15_000))
  assert len(counts) == 15
  # Five standard deviations of a count that is 1000 on average.
  assert max(abs(count - 1000) for count in counts.values()) < 155


def test_draws_follow_the_generator():
  ids = np.arange(10, 300)
  same, again, other = (corrupt(ids, seed=seed)[0] for seed in (1, 1, 2))
  np.testing.assert_array_equal(same, again)
  assert not np.array_equal(same, other)


@pytest.mark.parametrize('ids, expected', [
    ([], ([EOS], [EOS])),
    # T5's mask of two tokens, cut: the one token is no noise.
    ([7], ([7, EOS], [9999, EOS])),
    ([7, 8], ([7, 9999, EOS], [9999, 8, EOS])),
])
def test_shortest_texts(ids, expected):
  inputs, targets = corrupt(ids)
  assert (inputs.tolist(), targets.tolist()) == expected


def test_written_out():
  """The module's example: spans of c d and of g."""
  a, b, c, d, e, f, g = ids = list(range(10, 17))
  settings = SpanCorruptionOptions(3 / 7, 1.5)
  seed = next(seed for seed in itertools.count() if noise_mask(
      7, settings, np.random.default_rng(seed)).tolist()
              == [False, False, True, True, False, False, True])
  inputs, targets = corrupt(ids, settings, seed)
  assert inputs.tolist() == [a, b, 9999, e, f, 9998, EOS]
  assert targets.tolist() == [9999, c, d, 9998, g, EOS]


@pytest.mark.parametrize('changes, message', [
    ({'noise_density': 0.0}, r'noise_density=0\.0 must be in \(0, 1\)\.'),
    ({'noise_density': 1.0}, r'noise_density=1\.0 must be in \(0, 1\)\.'),
    ({'noise_density': float('nan')}, 'noise_density=nan must be'),
    ({'mean_noise_span_length': 0.5},
     r'mean_noise_span_length=0\.5 must be 1 or more and finite\.'),
    ({'mean_noise_span_length': float('inf')}, 'mean_noise_span_length=inf'),
])
def test_options_that_cannot_be(changes, message):
  with pytest.raises(ValueError, match=message):
    SpanCorruptionOptions(**changes)


def test_sentinels_and_what_follows_them():
  """T5 counts down from the highest id, through sentinels and beyond them."""
  vocabulary = Vocabulary(TINY, 100)
  ids = vocabulary.sentinel_ids(120)
  assert ids.tolist() == list(range(499, 379, -1))
  assert vocabulary.encode('<extra_id_0> <extra_id_1>') == ids[:2].tolist()


def test_sentinels_in_any_place(tmp_path):
  """Here after a piece that is none of them."""
  file = tmp_path / 'm.model'
  file.write_bytes(Vocabulary(TINY, 2)._processor.serialized_model_proto())
  vocabulary = Vocabulary(str(file), 4)  # 400, 401, then 402, 403
  assert vocabulary.size == 404
  names = [f'<extra_id_{n}>' for n in range(4)]
  ids = [vocabulary.encode(name)[-1] for name in names]
  assert ids == [401, 400, 403, 402]
  assert vocabulary.sentinel_ids(6).tolist() == [*ids, 399, 398]


def test_too_few_sentinels():
  with pytest.raises(DataError, match=r'no sentinels <extra_id_n>, which span '
                     'corruption needs: set data.extra_ids=100'):
    Vocabulary(TINY, 0).sentinel_ids(3)
  with pytest.raises(DataError, match='span corruption needs 498 sentinels: '
                     'more than the 500 ids of the vocabulary'):
    Vocabulary(TINY, 100).sentinel_ids(498)
  # Never padding, end or unknown.
  assert min(Vocabulary(TINY, 100).sentinel_ids(497)) == 3
