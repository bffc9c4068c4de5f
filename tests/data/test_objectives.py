"""Span corruption of documents, and mixes of objectives; gap sentences are in
test_row_streams.py."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.objectives import make_objective
from longt5_flax.data.options import (
    OBJECTIVES,
    PipelineOptions,
    objective_weights,
)
from longt5_flax.data.row_streams import RowStream
from longt5_flax.data.sources import DataError
from longt5_flax.data.span_corruption import (
    SpanCorruptionOptions,
    span_corruption_example,
    span_lengths,
)
from longt5_flax.data.vocabulary import Vocabulary

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
VOCABULARY = Vocabulary(str(FOLDER / 'tiny.model'))
TEXT = (FOLDER / 'owl_creek.txt').read_text('utf-8')
DOCUMENTS = [part.strip() for part in TEXT.split('\n\n') if part.strip()]
SENTINELS = VOCABULARY.sentinel_ids(100)
MIX = 'gap_sentences:1,span_corruption:3'


def make_options(objective='span_corruption', long_documents='pieces',
                 lengths=(256, 96), **changes):
  return PipelineOptions(*lengths, objective=objective, global_block_size=8,
                         long_documents=long_documents, **changes)


def examples_of(text, options, seeds=(0,)):
  objective = make_objective(VOCABULARY, options)
  document, start, found = objective.read(text), 0, []
  while start is not None:
    example, start = objective.example(document, start, seeds, (9, 9))
    found.append(example)
  return found


def restored(example):
  """The text's tokens: those of the inputs with the targets in place."""
  spans, sentinels = {}, set(SENTINELS.tolist())
  for token in example.targets[:-1].tolist():
    if token in sentinels:
      spans[token] = []
      last = token
    else:
      spans[last].append(token)
  return [token for place in example.inputs[:-1].tolist()
          for token in spans.get(place, [place])]


def test_spans_of_pieces_fill_the_inputs_and_lose_nothing():
  found = examples_of(TEXT, make_options())
  assert len(found) > 10
  assert {len(example.inputs) for example in found[:-1]} == {256}
  assert 1 < len(found[-1].inputs) <= 256
  assert all(example.lost == 0 for example in found)
  tokens = [token for example in found for token in restored(example)]
  assert tokens == list(itertools.chain.from_iterable(
      map(VOCABULARY.encode, TEXT.split('\n'))))


def test_pieces_are_shorter_where_targets_would_not_fit():
  found = examples_of(TEXT, make_options(lengths=(256, 40)))
  assert {len(example.targets) for example in found[:-1]} == {40}
  assert max(len(example.inputs) for example in found) < 256
  assert all(example.lost == 0 for example in found)
  for lengths in ((3, 3), (5, 200)):
    found = examples_of('One two. Three', make_options(lengths=lengths))
    tokens = [token for example in found for token in restored(example)]
    assert tokens == VOCABULARY.encode('One two. Three')
    for example in found:
      assert len(example.inputs) <= lengths[0]
      assert len(example.targets) <= lengths[1]


def test_cut_is_the_first_piece_alone():
  options = make_options(long_documents='cut')
  whole, cut = (examples_of(TEXT, make_options(long_documents=way))
                for way in ('pieces', 'cut'))
  assert len(cut) == 1
  for one, other in zip(cut[0], whole[0], strict=True):
    assert np.array_equal(one, other)
  size, targets = span_lengths(256, options.span_corruption)
  ids = make_objective(VOCABULARY, options).read(TEXT).ids[:size]
  expected = span_corruption_example(
      ids, options.span_corruption, np.random.default_rng((0, 0)), SENTINELS,
      VOCABULARY.eos_id)
  assert np.array_equal(cut[0].inputs, expected[0])
  assert np.array_equal(cut[0].targets, expected[1])
  # As published, targets that do not fit are cut.
  (short,) = examples_of(TEXT, make_options(long_documents='cut',
                                            lengths=(256, 30)))
  assert np.array_equal(short.targets, expected[1][:30])
  assert short.lost == targets - 30


def test_options_of_spans_are_used():
  few, many = (examples_of(TEXT, make_options(
      lengths=(256, 256), span_corruption=SpanCorruptionOptions(*values)))
               for values in ((0.05, 5.0), (0.4, 2.0)))
  assert len(few) > len(many)
  sentinels = [np.isin(found[0].inputs, SENTINELS).sum()
               for found in (few, many)]
  assert sentinels[0] < 5 < 40 < sentinels[1]


@pytest.mark.parametrize('text', ['', '  ', 'One.', '日本語。' * 500])
@pytest.mark.parametrize('long_documents', ['cut', 'pieces'])
def test_odd_documents(text, long_documents):
  for objective in ('span_corruption', MIX):
    options = make_options(objective, long_documents)
    for example in examples_of(text, options):
      assert 1 <= len(example.inputs) <= 256
      assert 1 <= len(example.targets) <= 96
    assert next(RowStream([text], VOCABULARY, options, 2, 1)).examples


def test_weights():
  assert objective_weights('gap_sentences') == {'gap_sentences': 1}
  assert objective_weights('span_corruption:0.5') == {'span_corruption': 0.5}
  assert objective_weights(' span_corruption: 2, gap_sentences:1e-3 ') == {
      'span_corruption': 2, 'gap_sentences': 0.001}


def kinds(objective, positions):
  """Which objective each document gets, by its position."""
  mix, *parts = (
      make_objective(VOCABULARY, make_options(name, lengths=(64, 64)))
      for name in (objective, *OBJECTIVES))
  document = mix.read('A dog ran. A cat ran. The dog and the cat ran home.')
  found = []
  for position in positions:
    example, _ = mix.example(document, 0, (0, 7, position), (64, 64))
    found += [name for name, part in zip(OBJECTIVES, parts, strict=True)
              if np.array_equal(example.targets, part.example(
                  document, 0, (0, 7, position), (64, 64))[0].targets)]
  assert len(found) == len(positions)
  return found


def test_mix_draws_by_weight_for_each_document():
  counts = Counter(kinds(MIX, range(1000)))
  assert counts['span_corruption'] == pytest.approx(750, abs=45)
  # The draw is the document's own: it is not the same for all that is drawn.
  assert kinds(MIX, [3, 700]) == [kinds(MIX, [3])[0], kinds(MIX, [700])[0]]
  reordered = kinds('span_corruption:3,gap_sentences:1', range(1000))
  assert Counter(reordered)['span_corruption'] == pytest.approx(750, abs=45)


def test_pieces_of_a_document_have_one_objective():
  options = make_options('gap_sentences:1,span_corruption:1')
  seen = set()
  for position in range(12):
    found = examples_of(TEXT, options, (0, 0, position))
    spans = [bool(np.isin(example.targets, SENTINELS).any())
             for example in found]
    assert len(set(spans)) == 1
    seen |= set(spans)
  assert seen == {False, True}


@pytest.mark.parametrize('long_documents', ['cut', 'pieces'])
def test_mix_resumes_after_any_row(long_documents):
  options = make_options('gap_sentences:1,span_corruption:1', long_documents,
                         gap_sentences=GapSentenceOptions(strategy='random'))
  stream = RowStream([TEXT, *DOCUMENTS], VOCABULARY, options, 2, 1)
  states, rows = [], []
  for _ in range(40):
    states.append(stream.get_state())
    rows.append(next(stream).features['decoder_target_tokens'])
  spans = [np.isin(row, SENTINELS).any() for row in rows]
  assert 0 < sum(spans) < 40
  for done in range(0, 36, 5):
    stream.set_state(states[done])
    for row in rows[done:done + 4]:
      assert np.array_equal(next(stream).features['decoder_target_tokens'], row)


def test_spans_need_sentinels():
  with pytest.raises(DataError, match='has no sentinels <extra_id_n>'):
    make_objective(Vocabulary(str(FOLDER / 'tiny.model'), 0), make_options(MIX))
