"""What GenerationOptions refuses, and how it says so."""

import jaxtyping
import pytest

from longt5_flax.generation.options import GenerationError, GenerationOptions


@pytest.mark.parametrize('options, message', [
    ({'max_length': 0}, 'max_length=0 must be an integer, at least 1'),
    ({'max_length': 2.5}, r'max_length=2\.5 must be an integer'),
    ({'min_length': -1}, 'min_length=-1 must be an integer, at least 0'),
    ({'num_beams': 0}, 'num_beams=0 must be an integer, at least 1'),
    ({'num_beams': True}, 'num_beams=True must be an integer'),
    ({'top_k': -1}, 'top_k=-1 must be an integer, at least 0'),
    ({'no_repeat_ngram_size': -2}, 'no_repeat_ngram_size=-2 must be'),
    ({'num_return_sequences': 0}, 'num_return_sequences=0 must be an integer'),
    ({'num_return_sequences': 2},
     'num_return_sequences=2 must be 1 without beams and without sampling'),
    ({'num_return_sequences': 4, 'num_beams': 3},
     'num_return_sequences=4 must be at most num_beams=3'),
    ({'top_p': 1.5}, r'top_p=1\.5 must be from 0 to 1'),
    ({'temperature': 0.0, 'do_sample': True},
     r'temperature=0\.0 must be greater than 0; for the likeliest token, do_'),
    ({'temperature': 'hot'}, "temperature='hot' must be a finite number"),
    ({'length_penalty': float('nan')},
     'length_penalty=nan must be a finite number'),
    ({'repetition_penalty': 0.0},
     r'repetition_penalty=0\.0 must be greater than 0'),
    ({'early_stopping': 'always'},
     "early_stopping='always' must be True, False or 'never'"),
    ({'eos_token_ids': 1}, 'eos_token_ids=1 must be a tuple of token ids'),
    ({'eos_token_ids': (1, -1)}, r'eos_token_ids=\(1, -1\) must be a tuple'),
    ({'pad_token_id': None}, 'pad_token_id=None must be a token id'),
    ({'forced_bos_token_id': -3}, 'forced_bos_token_id=-3 must be a token id'),
])
def test_refused(options, message, monkeypatch):
  # As without the tests' own checks of types.
  monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
  with pytest.raises(GenerationError, match=message):
    GenerationOptions(**options)


def test_what_is_ignored_is_not_refused():
  GenerationOptions(temperature=0.0)
  GenerationOptions(min_length=30, max_length=20)
  GenerationOptions(do_sample=True, num_return_sequences=7)


def test_tokens_outside_the_vocabulary():
  options = GenerationOptions(eos_token_ids=(1, 9), forced_bos_token_id=12)
  options.check_tokens(13)
  with pytest.raises(GenerationError, match=(
      'forced_bos_token_id=12 must be below the vocabulary size, 12')):
    options.check_tokens(12)
  with pytest.raises(GenerationError, match=r'eos_token_ids=\(1, 9\) must be'):
    options.check_tokens(9)


def test_rows_per_input():
  assert GenerationOptions().rows_per_input == 1
  assert GenerationOptions(
      num_beams=4, num_return_sequences=2).rows_per_input == 4
  assert GenerationOptions(
      do_sample=True, num_return_sequences=3).rows_per_input == 3
