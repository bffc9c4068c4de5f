"""longt5_flax.data.tokenizer; its ids are the vocabulary's."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from longt5_flax import Tokenizer
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

TINY = Path(__file__).parent.parent / 'testdata' / 'vocabulary' / 'tiny.model'
SHORT, LONG = 'A man stood upon a bridge.', 'He looked <extra_id_0> down.'


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer(TINY)


def test_ids_are_the_vocabularys_and_the_end(tokenizer):
  expected = Vocabulary(str(TINY), 100).encode(LONG)
  assert 499 in expected
  encoded = tokenizer(LONG)
  assert encoded['input_ids'] == encoded.input_ids == [*expected, 1]
  assert encoded.attention_mask == [1] * (len(expected) + 1)
  assert tokenizer(LONG, add_special_tokens=False).input_ids == expected
  assert tokenizer.encode(LONG) == [*expected, 1]
  assert len(tokenizer) == 500
  assert (tokenizer.pad_token_id, tokenizer.eos_token_id,
          tokenizer.unk_token_id) == (0, 1, 2)


@pytest.mark.parametrize('kind, array', [('np', np.ndarray),
                                         ('jax', jnp.ndarray)])
def test_batch(tokenizer, kind, array):
  one, two = tokenizer(SHORT).input_ids, tokenizer(LONG).input_ids
  assert len(one) != len(two)
  length = max(len(one), len(two))
  batch = tokenizer([SHORT, LONG], padding=True, return_tensors=kind)
  assert isinstance(batch.input_ids, array)
  assert batch.input_ids.dtype == batch.attention_mask.dtype == np.int32
  np.testing.assert_array_equal(batch.input_ids, [
      ids + [0] * (length - len(ids)) for ids in (one, two)])
  np.testing.assert_array_equal(
      batch.attention_mask, np.asarray(batch.input_ids) > 0)
  assert tokenizer(SHORT, return_tensors=kind).input_ids.shape == (1, len(one))


def test_lengths(tokenizer):
  ids = tokenizer(SHORT).input_ids
  cut = tokenizer(SHORT, truncation=True, max_length=5).input_ids
  assert cut == [*ids[:4], 1]
  assert tokenizer(SHORT, truncation=True, max_length=99).input_ids == ids
  padded = tokenizer(SHORT, padding='max_length', max_length=50)
  assert padded.input_ids == ids + [0] * (50 - len(ids))
  assert sum(padded.attention_mask) == len(ids)
  batch = tokenizer([SHORT, LONG], padding='longest', pad_to_multiple_of=16,
                    return_tensors='np')
  assert batch.input_ids.shape[1] % 16 == 0


def test_decode(tokenizer):
  ids = [0, *tokenizer(LONG).input_ids, 0, 0]
  assert tokenizer.decode(ids, skip_special_tokens=True) == 'He looked down.'
  assert tokenizer.decode(np.array(ids)) == (
      '<pad> He looked <extra_id_0> down. </s> <pad> <pad>')
  assert tokenizer.batch_decode(jnp.array([ids, ids])) == 2 * [
      tokenizer.decode(ids)]
  assert tokenizer.decode([2, 499, 498, 900]) == (
      '<unk> <extra_id_0> <extra_id_1> <unk>')
  assert tokenizer.decode([]) == ''


def test_spaces_before_punctuation(tokenizer):
  ids = tokenizer("Stop , he said . It 's done !").input_ids
  assert tokenizer.decode(ids, True, clean_up_tokenization_spaces=True) == (
      "Stop, he said. It's done!")
  assert tokenizer.decode(ids, True).startswith('Stop , he')


def test_folder(tokenizer, tmp_path):
  Tokenizer(TINY, extra_ids=7).save_pretrained(tmp_path / 'new')
  read = Tokenizer.from_pretrained(tmp_path / 'new')
  assert read.extra_ids == 7
  assert len(read) == 407
  assert read(SHORT) == tokenizer(SHORT)
  read.save_pretrained(tmp_path / 'new')
  (tmp_path / 'new' / 'tokenizer_config.json').unlink()
  assert len(Tokenizer.from_pretrained(str(tmp_path / 'new'))) == 500
  assert len(Tokenizer.from_pretrained(TINY)) == 500
  assert len(Tokenizer(TINY, extra_ids=0)) == 400


@pytest.mark.parametrize('arguments, message', [
    ({'padding': 'longer'}, "padding='longer' must be False"),
    ({'return_tensors': 'pt'}, "return_tensors='pt' must be None"),
    ({'truncation': True}, 'need max_length='),
    ({'padding': 'max_length'}, 'need max_length='),
    ({'return_tensors': 'np'}, 'use padding=True'),
])
def test_refused(tokenizer, arguments, message):
  with pytest.raises(DataError, match=message):
    tokenizer([SHORT, LONG], **arguments)


@pytest.mark.parametrize('config, message', [
    ('[1]', 'must hold a JSON object'), ('{', 'must hold a JSON object'),
    ('{"extra_ids": -1}', 'extra_ids=-1 must be an integer'),
    ('{"extra_ids": "many"}', "extra_ids='many' must be an integer")])
def test_damaged_folders(tmp_path, config, message):
  with pytest.raises(DataError, match=r'cannot read vocabulary .*spiece.model'):
    Tokenizer.from_pretrained(tmp_path)
  (tmp_path / 'spiece.model').write_bytes(TINY.read_bytes())
  (tmp_path / 'tokenizer_config.json').write_text(config)
  with pytest.raises(DataError, match=message):
    Tokenizer.from_pretrained(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'a': None}))
  assert Tokenizer.from_pretrained(tmp_path).extra_ids == 100
