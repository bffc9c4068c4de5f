"""Prepared shards: the batches of the text, from less work."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from longt5_flax.data.documents import TokenizedDocument, Words
from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.pipeline import (
    BatchIterator,
    PipelineOptions,
    fixed_batches,
)
from longt5_flax.data.prepared import (
    METADATA,
    UNFINISHED,
    PreparedDocuments,
    from_record,
    settings_that_matter,
    to_record,
)
from longt5_flax.data.shard_folder import ShardFolder, make_plan
from longt5_flax.data.shard_writer import ShardWriter
from longt5_flax.data.sources import DataError, Documents
from longt5_flax.data.vocabulary import Vocabulary

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
VOCABULARY = Vocabulary(str(FOLDER / 'tiny.model'))
TEXT = (FOLDER / 'owl_creek.txt').read_text('utf-8')
PARAGRAPHS = TEXT.split('\n\n')
# Of one paragraph, of many, of none; with a sentence that no row holds.
TEXTS = [*PARAGRAPHS[:12], '', TEXT[:8000], '日本語。' * 200 + 'One two. ' * 9,
         'and the water was cold ' * 60 + 'so. The end.']
DOCUMENTS = Documents(TEXTS)
MIX = 'gap_sentences:2,span_corruption:1'


def make_options(**changes):
  return PipelineOptions(**{
      'inputs_length': 192, 'targets_length': 96, 'objective': MIX,
      'global_block_size': 8, **changes})


def write(folder, options, num_shards=3):
  plan, _ = make_plan(DOCUMENTS, settings_that_matter(VOCABULARY, options),
                      num_shards)
  shards = ShardFolder(str(folder), plan)
  scored = 'gap_sentences' in options.objective
  for _ in ShardWriter(
      str(folder), shards.missing(), DOCUMENTS, VOCABULARY,
      options.gap_sentences if scored else None, plan['group_size']).run():
    pass
  shards.finish()
  return folder


def read(folder, options, vocabulary=VOCABULARY):
  return PreparedDocuments(
      str(folder), settings_that_matter(vocabulary, options))


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  return write(tmp_path_factory.mktemp('prepared') / 'train', make_options())


def check_equal(batches, expected):
  for batch, other in zip(batches, expected, strict=True):
    assert list(batch) == list(other)
    for name in batch:
      assert np.array_equal(batch[name], other[name])


@pytest.mark.parametrize('scored', [True, False])
def test_record_round_trip(scored):
  scores = np.float32([0.1, 1e-30, 3.5]) if scored else None
  document = TokenizedDocument(
      np.int32([70_000, 3, 4, 5]), np.int64([0, 1, 1, 4]),
      Words(np.int64([0, 1, 0, 300]), np.int64([0, 2, 3, 4]), 301), scores)
  for each in (document, TokenizedDocument(
      np.int32([]), np.int64([0]), Words(np.int64([]), np.int64([0]), 0),
      None if scores is None else scores[:0])):
    found = from_record(to_record(each))
    for name in ('ids', 'ends', 'scores'):
      one, other = getattr(found, name), getattr(each, name)
      assert (one is None) == (other is None)
      assert one is None or one.dtype == other.dtype
      assert np.array_equal(one, other) or one is None
    assert np.array_equal(found.words.ids, each.words.ids)
    assert np.array_equal(found.words.ends, each.words.ends)
    assert found.words.size == each.words.size


OPTIONS = [
    {}, {'long_documents': 'pieces'}, {'packing': False},
    {'objective': 'gap_sentences', 'inputs_length': 64, 'targets_length': 40,
     'long_documents': 'pieces'},
    {'objective': 'span_corruption', 'long_documents': 'pieces'}]
STRATEGIES = [{'strategy': 'greedy_rouge'}, {'strategy': 'continuous_rouge'},
              {'strategy': 'hybrid', 'probabilities': (0.25,) * 4},
              {'noise': None, 'ratio': 0.5}]


@pytest.mark.parametrize('changes', OPTIONS + [
    {'gap_sentences': GapSentenceOptions(**each)} for each in STRATEGIES],
    ids=str)
def test_batches_are_those_of_the_text(prepared, changes):
  """From one folder: what it does not depend on may differ."""
  options = make_options(**changes)
  documents = read(prepared, options)
  assert len(documents) == len(TEXTS)
  text, shards = (BatchIterator(source, VOCABULARY, options, 4, range(4))
                  for source in (DOCUMENTS, documents))
  # Several epochs.
  for _ in range(12):
    check_equal([next(shards)], [next(text)])
  assert shards.get_state() == text.get_state()
  assert shards.stats() == text.stats()
  check_equal(fixed_batches(documents, VOCABULARY, options, 3),
              fixed_batches(DOCUMENTS, VOCABULARY, options, 3))


@pytest.mark.parametrize('long_documents', ['cut', 'pieces'])
def test_other_scoring_is_prepared_by_itself(tmp_path, long_documents):
  options = make_options(
      long_documents=long_documents, gap_sentences=GapSentenceOptions(
          ngram=2, metric='recall', option='log', stop_words=('the', 'of')))
  documents = read(write(tmp_path / 'train', options), options)
  for one, other in zip(
      BatchIterator(documents, VOCABULARY, options, 4, range(4)),
      itertools.islice(
          BatchIterator(DOCUMENTS, VOCABULARY, options, 4, range(4)), 8),
      strict=False):
    check_equal([one], [other])


def test_workers_read_the_shards(prepared):
  options = make_options(long_documents='pieces')
  documents = read(prepared, options)
  with BatchIterator(documents, VOCABULARY, options, 4, range(4),
                     workers=2) as batches:
    check_equal(itertools.islice(batches, 6), itertools.islice(
        BatchIterator(DOCUMENTS, VOCABULARY, options, 4, range(4)), 6))


def test_goes_on_from_text_with_shards_and_back(prepared):
  options = make_options(long_documents='pieces')
  sources = [DOCUMENTS, read(prepared, options)]
  whole = list(itertools.islice(
      BatchIterator(DOCUMENTS, VOCABULARY, options, 4, range(4)), 8))
  found, state = [], None
  for source in (*sources, *sources):
    batches = BatchIterator(source, VOCABULARY, options, 4, range(4))
    if state:
      batches.set_state(json.loads(json.dumps(state)))
    found += itertools.islice(batches, 2)
    state = batches.get_state()
  check_equal(found, whole)


def test_epochs_draw_anew(prepared):
  """What is stored holds no draw."""
  options = make_options(objective='gap_sentences', packing=False,
                         inputs_length=4096)
  documents = [read(prepared, options)[13]]
  batches = BatchIterator(documents, VOCABULARY, options, 1, range(1))
  rows = [next(batches)['encoder_input_tokens'].tobytes() for _ in range(6)]
  assert len(set(rows)) == 6


def test_scores_are_used_and_not_made_anew(prepared, monkeypatch):
  options = make_options(objective='gap_sentences')

  def refuse(*_):
    raise AssertionError

  monkeypatch.setattr(
      'longt5_flax.data.gap_sentences.sentence_scores', refuse)
  monkeypatch.setattr(Vocabulary, 'encode', refuse)
  next(BatchIterator(read(prepared, options), VOCABULARY, options, 4, range(4)))


def test_bytes_do_not_depend_on_who_writes(prepared, tmp_path):
  other = write(tmp_path / 'again', make_options(seed=9))
  assert sorted(path.name for path in other.iterdir()) == [
      '00000.array_record', '00001.array_record', '00002.array_record',
      METADATA]
  for path in other.iterdir():
    assert path.read_bytes() == (prepared / path.name).read_bytes()


@pytest.mark.parametrize('num_shards', [1, 2, 100])
def test_documents_are_in_order_in_any_shards(tmp_path, num_shards):
  options = make_options(objective='span_corruption')
  documents = read(write(tmp_path / 'train', options, num_shards), options)
  assert [document.ids.tolist() for document in documents] == [
      VOCABULARY.encode(text) for text in TEXTS]
  assert len(list((tmp_path / 'train').glob('*.array_record'))) <= len(TEXTS)
  assert documents[-1].ids.tolist() == VOCABULARY.encode(TEXTS[-1])
  with pytest.raises(IndexError):
    documents[len(TEXTS)]


# Mistakes.


def refusal(folder, options, vocabulary=VOCABULARY):
  with pytest.raises(DataError) as error:
    read(folder, options, vocabulary)
  return str(error.value)


@pytest.mark.parametrize('changes, message', [
    ({'ngram': 2}, 'gap_sentences.ngram=1, not 2'),
    ({'metric': 'recall'}, "gap_sentences.metric='F', not 'recall'"),
    ({'option': 'log'}, "gap_sentences.option='standard', not 'log'"),
    ({'stop_words': ('the',)}, "gap_sentences.stop_words=[], not ['the']")],
    ids=str)
@pytest.mark.parametrize('long_documents', ['cut', 'pieces'])
def test_other_scoring_is_refused(prepared, changes, message, long_documents):
  options = make_options(gap_sentences=GapSentenceOptions(**changes),
                         long_documents=long_documents)
  assert refusal(prepared, options) == (
      f'{prepared} was prepared with {message}: keep the value, or prepare it '
      'again')
  # Nothing is scored.
  read(prepared, make_options(gap_sentences=options.gap_sentences,
                              objective='span_corruption'))


def test_other_vocabulary_is_refused(prepared):
  other = Vocabulary(str(FOLDER / 'tiny.model'), 7)
  assert refusal(prepared, make_options(), other) == (
      f"{prepared} was prepared with data.vocabulary='{VOCABULARY.size} ids, "
      f"sha256 {VOCABULARY.fingerprint[:16]}', not '{other.size} ids, sha256 "
      f"{other.fingerprint[:16]}': keep the value, or prepare it again")


def test_ids_alone_have_no_gap_sentences(tmp_path):
  folder = write(tmp_path / 'ids', make_options(objective='span_corruption'))
  assert refusal(folder, make_options()) == (
      f'{folder} was prepared for data.objective without gap_sentences: it has '
      'nothing to select them by')


def test_damage_is_named(prepared, tmp_path):
  folder, options = tmp_path / 'train', make_options()
  shutil.copytree(prepared, folder)
  shard = folder / '00001.array_record'
  content = shard.read_bytes()
  size = len(content)
  again = 'the command that prepared it makes it again'
  shard.write_bytes(content[:-5000])
  assert refusal(folder, options) == (
      f'shard {shard} is cut off: it has {size - 5000} of {size} bytes; '
      + again)
  shard.write_bytes(content + b'x')
  assert refusal(folder, options) == (
      f'shard {shard} has {size + 1} bytes, not {size}; {again}')
  shard.unlink()
  assert refusal(folder, options) == (
      f'cannot read shard {shard}: No such file or directory; {again}')
  shard.write_bytes(content)
  # Before it is damaged: what checks types takes a document as a sample.
  with BatchIterator(
      read(folder, options), VOCABULARY, options, 2, range(2), 1) as batches:
    shard.write_bytes(content[:300] + b'damage' + content[306:])
    documents = read(folder, options)
    assert documents[0] is not None
    for take in (lambda: list(documents), lambda: next(batches)):
      with pytest.raises(DataError) as error:
        take()
      assert str(error.value).startswith(f'shard {shard} is damaged (')
      assert str(error.value).endswith(
          '): delete it, and the command that prepared it makes it again')
      assert '\n' not in str(error.value)


def test_folder_that_is_none(prepared, tmp_path):
  options, folder = make_options(), tmp_path / 'train'
  for path in (folder, tmp_path, prepared / METADATA):
    assert refusal(path, options) == (
        f'{path} is no folder that longt5_flax.prepare has finished: it has no '
        f'{METADATA}')
  assert prepared.name == 'train'
  assert refusal(prepared.parent, options).endswith(
      f'it has no {METADATA}; {prepared} has one')
  folder.mkdir()
  metadata = json.loads((prepared / METADATA).read_text())
  (folder / f'{METADATA}{UNFINISHED}').write_text(json.dumps(metadata))
  assert 'has finished' in refusal(folder, options)
  (folder / METADATA).write_text('{"format": 1')
  assert refusal(folder, options).startswith(
      f'{folder / METADATA} is damaged: ')
  (folder / METADATA).write_text(json.dumps(metadata | {'format': 9}))
  assert refusal(folder, options) == (
      f'{folder / METADATA} has format=9, not 1: prepare it again')
