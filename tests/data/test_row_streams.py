"""Objectives and row streams: what is in a row, and in which order."""

import collections
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from longt5_flax.data import row_streams
from longt5_flax.data.documents import split_sentences
from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.objectives import make_objective
from longt5_flax.data.options import PipelineOptions
from longt5_flax.data.row_streams import RowStream
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
VOCABULARY = Vocabulary(str(FOLDER / 'tiny.model'))
TEXT = (FOLDER / 'owl_creek.txt').read_text('utf-8')
# Of one paragraph each, from 4 to 700 tokens.
DOCUMENTS = [part.strip() for part in TEXT.split('\n\n') if part.strip()]
# Of several sentences; makes one example at 256 -> 96.
FITS = DOCUMENTS[6]
# Nothing is masked, so that inputs are the documents.
NONE = GapSentenceOptions(strategy='none')
RANDOM = GapSentenceOptions(strategy='random', ratio=0.5)


def make_options(inputs_length=256, targets_length=96, **changes):
  return PipelineOptions(
      inputs_length, targets_length,
      **{'global_block_size': 8, 'long_documents': 'pieces', **changes})


def read(text, options):
  """The token ids of the sentences of a document."""
  document = make_objective(VOCABULARY, options).read(text)
  return [ids.tolist() for ids in np.split(document.ids, document.ends[1:-1])]


def examples_of(text, options, room=None):
  """All examples of a document, and the token ids of the sentences of each."""
  objective = make_objective(VOCABULARY, options)
  document, sentences = objective.read(text), read(text, options)
  room = room or (options.inputs_length, options.targets_length)
  found, start = [], 0
  while start is not None:
    example, end = objective.example(document, start, (0,), room)
    found.append((example, sentences[start:end]))
    start = end
  return found


def text_of(sentences):
  """Of the token ids of sentences."""
  return VOCABULARY.decode(itertools.chain.from_iterable(sentences))


def segments(row):
  """(inputs, targets) of the examples of a row, as lists of ids."""
  features = row.features
  found = []
  for segment in range(1, row.examples + 1):
    found.append(tuple(
        features[tokens][features[f'{side}_segment_ids'] == segment].tolist()
        for side, tokens in (('encoder', 'encoder_input_tokens'),
                             ('decoder', 'decoder_target_tokens'))))
  return found


def take(stream, count):
  return list(itertools.islice(stream, count))


@pytest.mark.parametrize('lengths', [(64, 24), (256, 96), (2, 1)])
def test_pieces_joined_are_the_document(lengths):
  options = make_options(*lengths, gap_sentences=NONE)
  for text in (TEXT, DOCUMENTS[0], DOCUMENTS[3]):
    found = examples_of(text, options)
    ids = [token for example, _ in found for token in example.inputs[:-1]]
    assert ids == list(itertools.chain.from_iterable(read(text, options)))
    for example, _ in found:
      assert len(example.inputs) <= options.inputs_length
      assert example.inputs[-1] == 1


def test_pieces_keep_sentences_whole_and_lose_no_target():
  options = make_options()
  found = examples_of(TEXT, options)
  assert [ids for _, sentences in found for ids in sentences] == list(
      map(VOCABULARY.encode, split_sentences(TEXT)))
  assert len(found) > 10
  for example, sentences in found:
    assert sum(map(len, sentences)) <= options.inputs_length - 1
    assert not example.lost or len(sentences) == 1
    assert example.targets[-1] == 1 or example.lost


def test_piece_is_as_long_as_inputs_allow_where_targets_do():
  options = make_options(targets_length=256, gap_sentences=NONE)
  found = examples_of(TEXT, options)
  longest_sentence = max(map(len, read(TEXT, options)))
  for example, _ in found[:-1]:
    assert len(example.inputs) > 256 - longest_sentence


def test_room_is_filled_only_by_what_must_be_cut():
  options, room = make_options(), (100, 40)
  example, sentences = examples_of(TEXT, options, room)[0]
  _, longer = examples_of(TEXT, options)[0]
  assert 1 < len(sentences) < len(longer)
  assert len(example.inputs) <= 100
  assert len(example.targets) <= 40
  (example, sentences), = examples_of(FITS, options, room)
  assert text_of(sentences) == VOCABULARY.decode(VOCABULARY.encode(FITS))
  assert len(example.inputs) > 100


def test_room_is_not_filled_by_a_sentence_alone():
  """Nothing would be left in the inputs to tell it from."""
  options = make_options()
  (example, sentences), (whole, longer) = (
      examples_of(TEXT, options, room)[0] for room in ((40, 16), (256, 96)))
  assert sentences == longer
  assert np.array_equal(example.inputs, whole.inputs)


def test_pieces_fill_rows(monkeypatch):
  def filled():
    rows = take(RowStream([TEXT], VOCABULARY, make_options(), 1, 0), 80)
    return np.mean([row.features['decoder_loss_weights'] for row in rows])

  with_pieces = filled()
  monkeypatch.setattr(row_streams, '_LEAST_ROOM', 1.0)
  assert with_pieces > filled() + 0.03


def test_long_sentence_is_cut_into_sentences():
  """Text without '. ' is one sentence; in pieces it gets context again."""
  text = 'and the water was cold ' * 300 + 'so. The end.'
  options = make_options(gap_sentences=dataclasses.replace(
      GapSentenceOptions(), probabilities=(1.0, 0.0, 0.0, 0.0)))
  *parts, last = read(text, options)
  # targets_length less the end of sequence.
  assert set(map(len, parts[:-1])) == {95}
  assert list(itertools.chain(*parts)) == VOCABULARY.encode(
      text.removesuffix('The end.'))
  assert VOCABULARY.decode(last) == 'The end.'
  for example, sentences in examples_of(text, options):
    assert not example.lost
    assert len(sentences) == 1 or len(example.inputs) > 2


# A run of characters that no piece holds is one unknown piece.
@pytest.mark.parametrize('text, count', [
    ('', 1), ('   ', 1), ('One sentence.', 1), ('日本語。' * 500, 1),
    ('!' * 3000, None), ('Да. Нет. ' * 200, None)])
@pytest.mark.parametrize('long_documents', ['cut', 'pieces'])
def test_odd_documents(text, count, long_documents):
  options = make_options(long_documents=long_documents)
  found = examples_of(text, options)
  if long_documents == 'cut':
    assert len(found) == 1
  elif count is not None:
    assert len(found) == count
  for example, _ in found:
    assert 1 <= len(example.inputs) <= 256
    assert 1 <= len(example.targets) <= 96
  rows = take(RowStream([text], VOCABULARY, options, 2, 1), 3)
  assert all(row.examples for row in rows)


def test_cut_scores_the_whole_document():
  """Targets may come from what the inputs have no room for, and are lost."""
  options = make_options(long_documents='cut')
  (example, sentences), = examples_of(TEXT, options)
  assert sentences == list(map(VOCABULARY.encode, split_sentences(TEXT)))
  assert (len(example.inputs), len(example.targets)) == (256, 96)
  assert example.lost > 500
  assert 1 not in example.inputs


def test_mask_must_be_in_the_vocabulary():
  options = make_options(gap_sentences=GapSentenceOptions(mask_id=500))
  with pytest.raises(DataError, match=(
      r'^gap_sentences\.mask_id=500 must be less than the 500 ids of the '
      'vocabulary$')):
    make_objective(VOCABULARY, options)


@pytest.mark.parametrize('changes, message', [
    *(({'objective': objective},
       f"{objective=}{name} must be one of ('gap_sentences', "
       "'span_corruption', 'supervised'), or a mix such as "
       "'gap_sentences:1,span_corruption:1'")
      for objective, name in (
          ('ul2', ''), ('', ''),
          ('gap_sentences:1,ul2:1', ": 'ul2'"),
          ('gap_sentences:1,', ": ''"))),
    *(({'objective': f'gap_sentences:1,span_corruption{weight}'},
       f"objective='gap_sentences:1,span_corruption{weight}': the weight "
       f"{weight[1:]!r} of span_corruption must be a number above 0")
      for weight in (':x', ':0', ':-1', ':nan', ':inf', ':', '')),
    ({'objective': 'gap_sentences:1,gap_sentences:2'},
     "objective='gap_sentences:1,gap_sentences:2' names gap_sentences twice"),
    ({'objective': 'span_corruption', 'inputs_length': 2},
     'inputs_length=2 must be at least 3'),
    ({'objective': 'span_corruption', 'targets_length': 2},
     'targets_length=2 must be at least 3'),
    ({'long_documents': 'drop'},
     "long_documents='drop' must be one of ('cut', 'pieces')"),
    ({'inputs_length': 1}, 'inputs_length=1 must be at least 2'),
    ({'targets_length': 0}, 'targets_length=0 must be at least 1'),
    ({'global_block_size': 0}, 'global_block_size=0 must be at least 1'),
    ({'seed': -1}, 'seed=-1 must be at least 0')])
def test_options_that_cannot_be(changes, message):
  with pytest.raises(DataError) as error:
    make_options(**changes)
  assert str(error.value) == message


@pytest.mark.parametrize('packing', [True, False])
@pytest.mark.parametrize('long_documents', ['cut', 'pieces'])
def test_row(packing, long_documents):
  options = make_options(packing=packing, long_documents=long_documents)
  rows = take(RowStream(DOCUMENTS, VOCABULARY, options, 1, 0), 40)
  assert {name: (array.shape, array.dtype)
          for name, array in rows[0].features.items()} == {
              name: ((256 if name.startswith('encoder') else 96,), np.int32)
              for name in (
                  'encoder_input_tokens', 'encoder_segment_ids',
                  'encoder_positions', 'decoder_input_tokens',
                  'decoder_target_tokens', 'decoder_loss_weights',
                  'decoder_segment_ids', 'decoder_positions')}
  assert (max(row.examples for row in rows) > 1) == packing
  for row in rows:
    check_row(row)


def check_row(row):
  """By the definition, token by token."""
  features = row.features
  for side, tokens, block in (('encoder', 'encoder_input_tokens', 8),
                              ('decoder', 'decoder_target_tokens', 1)):
    segment_ids = features[f'{side}_segment_ids']
    assert segment_ids.max() == row.examples
    taken = np.zeros(len(segment_ids), bool)
    for segment in range(1, row.examples + 1):
      places, = np.nonzero(segment_ids == segment)
      assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
      assert places[0] % block == 0
      assert not taken[places[0]:].any()
      assert np.array_equal(features[f'{side}_positions'][places],
                            np.arange(len(places)))
      taken[places] = True
    assert not features[f'{side}_positions'][~taken].any()
    assert np.array_equal(features[tokens] > 0, taken)
  assert np.array_equal(features['decoder_loss_weights'],
                        features['decoder_segment_ids'] > 0)
  shifted = np.zeros(96, int)
  for i in range(1, 96):
    segment = features['decoder_segment_ids'][i]
    if segment and segment == features['decoder_segment_ids'][i - 1]:
      shifted[i] = features['decoder_target_tokens'][i - 1]
  assert np.array_equal(features['decoder_input_tokens'], shifted)


def test_packing_neither_loses_nor_changes_examples():
  def all_examples(packing):
    options = make_options(long_documents='cut', packing=packing)
    rows = [row for stream in range(3) for row in RowStream(
        DOCUMENTS, VOCABULARY, options, 3, stream, held_out=True)]
    return len(rows), sum(row.lost for row in rows), collections.Counter(
        (tuple(inputs), tuple(targets))
        for row in rows for inputs, targets in segments(row))

  rows, lost, examples = all_examples(packing=False)
  packed_rows, packed_lost, packed_examples = all_examples(packing=True)
  assert packed_rows < rows == len(DOCUMENTS)
  assert packed_lost == lost > 0
  assert packed_examples == examples


def order(batch_size, count, seed=0, **changes):
  """The documents of a batch's rows, and then of the next ones."""
  options = make_options(4096, 512, long_documents='cut', packing=False,
                         seed=seed, **changes)
  streams = [RowStream(DOCUMENTS, VOCABULARY, options, batch_size, row)
             for row in range(batch_size)]
  return [segments(next(streams[i % batch_size]))[0] for i in range(count)]


def test_stream_r_reads_positions_r_and_every_batch_size_further():
  """Also the draws belong to the position: other batch sizes draw the same."""
  one = order(1, 3 * len(DOCUMENTS), gap_sentences=RANDOM)
  assert order(3, len(one), gap_sentences=RANDOM) == one
  assert order(7, len(one), gap_sentences=RANDOM) == one


def test_epochs_are_shuffled_anew():
  size = len(DOCUMENTS)
  read = [inputs for inputs, _ in order(1, 3 * size, gap_sentences=NONE)]
  expected = sorted(VOCABULARY.encode(text) + [1] for text in DOCUMENTS)
  epochs = [read[i:i + size] for i in (0, size, 2 * size)]
  for epoch in epochs:
    assert sorted(epoch) == expected
    assert epoch != expected
  assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
  assert read[:size] != [
      inputs for inputs, _ in order(1, size, 1, gap_sentences=NONE)]


def test_epochs_draw_anew():
  document = [TEXT[:3000]]
  options = make_options(4096, 512, packing=False, long_documents='cut',
                         gap_sentences=RANDOM)
  rows = take(RowStream(document, VOCABULARY, options, 1, 0), 4)
  assert len({tuple(segments(row)[0][1]) for row in rows}) == 4


@pytest.mark.parametrize('long_documents', ['cut', 'pieces'])
def test_state_after_any_row(long_documents):
  options = make_options(long_documents=long_documents)
  stream = RowStream([TEXT, *DOCUMENTS], VOCABULARY, options, 2, 1)
  states, rows = [], []
  for _ in range(60):
    states.append(stream.get_state())
    rows.append(next(stream).features['encoder_input_tokens'])
  for done in range(0, 50, 3):
    stream.set_state(states[done])
    for row in rows[done:done + 9]:
      assert np.array_equal(next(stream).features['encoder_input_tokens'], row)


def test_state_is_of_as_many_documents():
  options = make_options()
  state = RowStream(DOCUMENTS, VOCABULARY, options, 4, 2).get_state()
  with pytest.raises(DataError, match=(
      f'^row 2 was saved with {len(DOCUMENTS)} documents and there are 3: '
      'the order would not be the same$')):
    RowStream(DOCUMENTS[:3], VOCABULARY, options, 4, 2).set_state(state)
