"""longt5_flax.data.vocabulary equals seqio; testdata/vocabulary/README.md."""

import json
import pickle
import re
from pathlib import Path

import pytest
import sentencepiece

from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
TINY = str(FOLDER / 'tiny.model')
GOLDEN = json.loads((FOLDER / 'seqio_ids.json').read_text('utf-8'))['cases']


@pytest.fixture(params=GOLDEN, ids=lambda case: f'{case["extra_ids"]} extra')
def case(request):
  return request.param


def check_equal(vocabulary, case):
  for name in ('size', 'pad_id', 'eos_id', 'unk_id'):
    assert getattr(vocabulary, name) == case[name]
  for encoded in case['encode']:
    assert vocabulary.encode(encoded['text']) == encoded['ids']
  for decoded in case['decode']:
    assert vocabulary.decode(decoded['ids']) == decoded['text']


def test_equals_seqio(case):
  check_equal(Vocabulary(TINY, case['extra_ids']), case)


def test_equals_seqio_after_pickling(case):
  vocabulary = Vocabulary(TINY, case['extra_ids'])
  check_equal(pickle.loads(pickle.dumps(vocabulary)), case)


def test_sentinels_that_the_file_holds_are_not_added(tmp_path):
  """As with cc_all.32000.100extra, which seqio reads with extra_ids=0."""
  with_100 = Vocabulary(TINY, 100)
  file = tmp_path / 'with_sentinels.model'
  file.write_bytes(with_100._processor.serialized_model_proto())
  for extra_ids in (0, 5, 100):
    check_equal(Vocabulary(str(file), extra_ids), GOLDEN[-1])


def test_last_ids_are_the_sentinels():
  vocabulary = Vocabulary(TINY, 100)
  assert vocabulary.encode('<extra_id_0> <extra_id_99>') == [499, 400]


def message(path, extra_ids=100):
  with pytest.raises(DataError) as error:
    Vocabulary(str(path), extra_ids)
  return str(error.value)


@pytest.mark.parametrize('content', [
    b'', b'{"text": "a"}\n', b'\x00\xff' * 99,
    (FOLDER / 'tiny.model').read_bytes()[:1001]], ids=[
        'empty', 'JSON', 'binary', 'cut short'])
def test_file_that_is_no_model(tmp_path, content):
  path = tmp_path / 'm.model'
  path.write_bytes(content)
  assert message(path) == f'vocabulary {path} is no SentencePiece model'


def test_other_mistakes(tmp_path):
  missing = tmp_path / 'missing.model'
  assert message(missing) == (
      f'cannot read vocabulary {missing}: No such file or directory')
  assert message(tmp_path) == (
      f'cannot read vocabulary {tmp_path}: Is a directory')
  assert message(TINY, -1) == 'extra_ids=-1 must be at least 0'


@pytest.mark.parametrize('ids, rule', [
    ({'pad_id': -1, 'unk_id': 0, 'eos_id': 1}, 'has padding as id -1: it must'),
    ({'pad_id': 0, 'unk_id': 1, 'eos_id': -1}, 'has no piece for the end of')])
def test_models_of_another_kind(tmp_path, ids, rule):
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['a b c d e f g']), vocab_size=12, bos_id=-1,
      model_prefix=str(tmp_path / 'm'), minloglevel=2, hard_vocab_limit=False,
      **ids)
  assert re.search(f'^vocabulary .*m.model {rule}',
                   message(tmp_path / 'm.model'))


def test_fingerprint_is_of_the_pieces(tmp_path):
  copy = tmp_path / 'other.model'
  copy.write_bytes(Path(TINY).read_bytes())
  first, again, fewer = (
      Vocabulary(str(path), extra_ids).fingerprint
      for path, extra_ids in ((TINY, 7), (copy, 7), (copy, 6)))
  assert first == again != fewer
