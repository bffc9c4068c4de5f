"""`generate`: golden sequences, buckets of lengths, settings."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import ConfigError, FlaxLongT5ForConditionalGeneration
from longt5_flax.api import GenerationConfig, programs
from longt5_flax.api.generation import merge_settings, resolve_options
from longt5_flax.generation.options import GenerationError, GenerationOptions

GOLDEN = [name for name in golden.names('hf_')
          if golden.load(name).get('generate_greedy_ids') is not None]


@functools.cache
def model_of(name):
  case = golden.load(name)
  model = FlaxLongT5ForConditionalGeneration(case.config, _do_init=False)
  model.params = case.params
  return model


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_greedy(name):
  """Without a mask: it is inferred from the padding."""
  case = golden.load(name)
  written = model_of(name).generate(case['input_ids'], max_new_tokens=20)
  np.testing.assert_array_equal(
      written.sequences, case['generate_greedy_ids'])
  assert 'scores' not in written


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_beams(name):
  case = golden.load(name)
  sequences, scores = model_of(name).generate(
      case['input_ids'], attention_mask=case['attention_mask'], num_beams=3,
      length_penalty=0.8, num_return_sequences=3, max_new_tokens=20).to_tuple()
  expected = 'generate_beam_return3_es_false'
  np.testing.assert_array_equal(sequences, case[f'{expected}_ids'])
  np.testing.assert_allclose(
      scores, case[f'{expected}_sequences_scores'], atol=1e-4)


# Inputs.


def test_bucket_lengths():
  lengths = [1, 128, 129, 1000, 1025, 1281, 9000, 16384, 16385]
  assert [programs.bucket_length(length, 128) for length in lengths] == [
      128, 128, 256, 1024, 1280, 1536, 10240, 16384, 20480]
  assert [programs.bucket_length(length, 8) for length in range(1, 41)] == [
      -(-length // 8) * 8 for length in range(1, 41)]
  for length in range(1, 5000, 7):
    bucket = programs.bucket_length(length, 8)
    assert length <= bucket < max(length + 8, 1.25 * length)


def test_a_bucket_is_one_program_and_changes_nothing(monkeypatch):
  case = golden.load('hf_tglobal_untied')
  model = model_of('hf_tglobal_untied')
  traced = []
  start = programs.decoding.start

  def counted(module, params, encoded, *args):
    traced.append(encoded.shape[1])
    return start(module, params, encoded, *args)

  monkeypatch.setattr(programs.decoding, 'start', counted)

  def write(length):
    return model.generate(
        case['input_ids'][:, :length],
        attention_mask=case['attention_mask'][:, :length], num_beams=2,
        max_length=13)

  bucketed = [write(length) for length in (33, 35, 37)]
  assert traced == [40]
  monkeypatch.setattr(programs, 'bucket_length', lambda length, _: length)
  plain = write(37)
  assert traced == [40, 37]
  np.testing.assert_array_equal(bucketed[-1].sequences, plain.sequences)
  golden.assert_close(bucketed[-1].scores, plain.scores)
  assert not np.array_equal(bucketed[0].scores, plain.scores)


def test_in_jit_and_from_encoder_outputs():
  case = golden.load('hf_tglobal_untied')
  model = model_of('hf_tglobal_untied')
  ids, mask = case['input_ids'], case['attention_mask']
  expected = case['generate_greedy_ids'][:, :7]
  encoded = model.encode(ids, mask)
  for outputs in (encoded, encoded.to_tuple(), dict(encoded)):
    written = model.generate(ids, attention_mask=mask, encoder_outputs=outputs,
                             max_length=7)
    np.testing.assert_array_equal(written.sequences, expected)
  inside = golden.jit(lambda params, ids: model.generate(
      ids, params=params, max_length=7).sequences)
  np.testing.assert_array_equal(inside(case.params, ids), expected)


def test_prompt_gets_the_start_token_if_no_row_has_it():
  case = golden.load('hf_tglobal_untied')
  model = model_of('hf_tglobal_untied')
  ids, expected = case['input_ids'], case['generate_greedy_ids'][:, :8]
  for prompt in (expected[:, :2], expected[:, 1:2]):
    written = model.generate(ids, decoder_input_ids=prompt, max_length=8)
    np.testing.assert_array_equal(written.sequences, expected)


def test_masked_part_of_a_prompt_is_not_there():
  """A prompt padded in front writes what it does without the padding."""
  case = golden.load('hf_tglobal_untied')
  ids, mask = case['input_ids'], case['attention_mask']
  write = functools.partial(
      model_of('hf_tglobal_untied').generate, num_beams=3, max_new_tokens=6)
  prompt, prompt_mask = np.full((5, 4), 57), np.ones((5, 4), int)
  prompt[:, 2] = prompt[0, 0] = 0
  prompt_mask[1, :2] = 0
  padded = write(ids, attention_mask=mask, decoder_input_ids=prompt,
                 decoder_attention_mask=prompt_mask)
  bare = write(ids[1:2], attention_mask=mask[1:2], decoder_input_ids=[[0, 57]])
  np.testing.assert_array_equal(
      padded.sequences[1, -6:], bare.sequences[0, -6:])
  golden.assert_close(padded.scores[1:2], bare.scores)


def test_start_token_put_before_a_masked_prompt_is_seen():
  case = golden.load('hf_tglobal_untied')
  write = functools.partial(
      model_of('hf_tglobal_untied').generate, case['input_ids'],
      max_new_tokens=6)
  prompt, mask = np.full((5, 2), 57), np.tile([0, 1], (5, 1))
  front = ((0, 0), (1, 0))
  expected = write(
      decoder_input_ids=np.pad(prompt, front),
      decoder_attention_mask=np.pad(mask, front, constant_values=1))
  np.testing.assert_array_equal(
      write(decoder_input_ids=prompt, decoder_attention_mask=mask).sequences,
      expected.sequences)


def test_draws_by_key():
  case = golden.load('hf_tglobal_untied')
  write = functools.partial(
      model_of('hf_tglobal_untied').generate, case['input_ids'],
      do_sample=True, max_new_tokens=8)
  first = write(prng_key=jax.random.key(1)).sequences
  again = write(prng_key=jax.random.key(1)).sequences
  other = write(prng_key=jax.random.PRNGKey(2)).sequences
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


@pytest.mark.parametrize('options', [
    {}, {'do_sample': True, 'top_k': 9, 'prng_key': jax.random.key(3)},
    {'decoder_input_ids': np.full((5, 3), 57), 'repetition_penalty': 1.5}])
def test_stream_is_generate_token_by_token(options):
  """Up to the last end: the third token of a row ends it here."""
  case = golden.load('hf_tglobal_untied')
  model, ids = model_of('hf_tglobal_untied'), case['input_ids']
  start = options.get('decoder_input_ids', np.zeros((5, 0))).shape[1] + 1
  free = model.generate(ids, max_new_tokens=8, **options).sequences
  options = options | {'max_new_tokens': 8, 'eos_token_id': [
      1, *(set(free[:, start + 2].tolist()) - {0, 1})]}
  written = np.stack(list(model.stream(ids, **options)), axis=1)
  expected = model.generate(ids, **options).sequences[:, start:]
  assert written.shape[1] <= 3
  np.testing.assert_array_equal(written, expected[:, :written.shape[1]])
  assert not np.any(expected[:, written.shape[1]:])


def test_no_stream_of_beams():
  case = golden.load('hf_tglobal_untied')
  with pytest.raises(GenerationError, match=r'num_beams=2 must be 1 for'):
    model_of('hf_tglobal_untied').stream(case['input_ids'], num_beams=2)


# Settings.


def options_of(defaults=None, prompt_length=1, **given):
  config = golden.load('hf_tglobal_untied').config
  settings = merge_settings(
      config, GenerationConfig.from_dict(defaults or {}), given)
  return resolve_options(settings, 'max_length' in given, prompt_length)


@pytest.mark.parametrize('defaults, given, expected', [
    ({}, {}, {'max_length': 21}),
    ({}, {'max_length': 20}, {'max_length': 20}),
    ({}, {'max_new_tokens': 5, 'max_length': 99}, {'max_length': 6}),
    ({'max_length': 30}, {}, {'max_length': 30}),
    ({'max_new_tokens': 4}, {}, {'max_length': 5}),
    ({}, {'min_new_tokens': 3, 'max_length': 9},
     {'max_length': 9, 'min_length': 4}),
    ({'num_beams': 4, 'max_length': 9}, {'num_beams': 2},
     {'num_beams': 2, 'max_length': 9}),
    ({'num_beams': 4, 'max_length': 9}, {'num_beams': None},
     {'num_beams': 4, 'max_length': 9}),
    ({'eos_token_id': [1, 7], 'max_length': 9}, {},
     {'eos_token_ids': (1, 7), 'max_length': 9}),
    ({'forced_eos_token_id': [1], 'max_length': 9}, {},
     {'forced_eos_token_id': 1, 'max_length': 9}),
    ({'typical_p': 1.0, 'transformers_version': '4.57.6', 'max_length': 9},
     {'use_cache': True, 'num_beam_groups': 1, 'suppress_tokens': None,
      'logits_processor': [], 'eos_token_id': np.array([1, 7])},
     {'max_length': 9, 'eos_token_ids': (1, 7)}),
])
def test_options_of_settings(defaults, given, expected):
  assert options_of(defaults, **given) == dataclasses.replace(
      GenerationOptions(), **expected)


def test_a_prompt_is_part_of_max_length():
  assert options_of(prompt_length=4).max_length == 24
  assert options_of(prompt_length=4, max_length=9).max_length == 9
  assert options_of(prompt_length=4, max_new_tokens=9).max_length == 13


@pytest.mark.parametrize('options, error, message', [
    ({'num_beam': 3}, TypeError, "generate() has no argument 'num_beam'."),
    ({'num_beam_groups': 2}, ConfigError,
     'generate: num_beam_groups=2 is not implemented.'),
    ({'output_scores': True}, ConfigError,
     'generate: output_scores=True is not implemented.'),
    ({'forced_eos_token_id': [1, 2]}, ConfigError,
     'generate: forced_eos_token_id=[1, 2] must be one id.'),
    ({'max_length': 1}, GenerationError, 'max_length=1 must be greater'),
    ({'max_new_tokens': 0}, ConfigError,
     'generate: max_new_tokens=0 must be an integer, at least 1.'),
    ({'min_new_tokens': 1.5}, ConfigError,
     'generate: min_new_tokens=1.5 must be an integer, at least 0.'),
    ({'generation_config': {'max_lenght': 3}}, TypeError,
     "generate() has no argument 'max_lenght'."),
    ({'generation_config': 'fast'}, ConfigError,
     'generation_config is of type str: must be a GenerationConfig or a dict'),
    ({'bad_words_ids': np.array([[3], [4]])}, ConfigError,
     'generate: bad_words_ids=array([[3], [4]]) is not implemented.'),
    ({'num_beams': 0}, GenerationError, 'num_beams=0 must be an integer'),
    ({'attention_mask': np.ones((5, 3))}, ConfigError,
     'attention_mask has shape (5, 3): must be (5, 37).'),
    ({'decoder_input_ids': np.ones((2, 3), int)}, ConfigError,
     'decoder_input_ids has 2 rows: must be 5, as input_ids.'),
    ({'decoder_input_ids': np.ones((5, 3), int),
      'decoder_attention_mask': np.ones((5, 2))}, ConfigError,
     'decoder_attention_mask has shape (5, 2): must be (5, 3).'),
    ({'decoder_attention_mask': np.ones((5, 2))}, ConfigError,
     'decoder_attention_mask has shape (5, 2): must be (5, 1).'),
    ({'decoder_input_ids': np.full((5, 3), 96)}, ConfigError,
     'decoder_input_ids holds the id 96: must be in [0, vocab_size=96).'),
])
def test_refused(options, error, message):
  case = golden.load('hf_tglobal_untied')
  with pytest.raises(error) as raised:
    model_of('hf_tglobal_untied').generate(case['input_ids'], **options)
  assert str(raised.value).startswith(message)


def test_settings_of_a_file(tmp_path):
  assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig()
  old = {'model_type': 'longt5', 'num_beams': 4, 'd_model': 7}
  (tmp_path / 'config.json').write_text(json.dumps(old))
  assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig(
      num_beams=4)
  new = {'max_length': 77, 'penalty_alpha': 0.6, 'top_k': 4}
  (tmp_path / 'generation_config.json').write_text(json.dumps(new))
  read = GenerationConfig.from_pretrained(tmp_path)
  assert read == GenerationConfig(
      max_length=77, top_k=4, not_implemented={'penalty_alpha': 0.6})
  with pytest.raises(ConfigError, match=r'penalty_alpha=0\.6 is not'):
    options_of(read.to_dict())


def test_settings_of_the_model_and_of_an_argument():
  case = golden.load('hf_tglobal_untied')
  model = model_of('hf_tglobal_untied')
  ids = jnp.asarray(case['input_ids'])
  other = FlaxLongT5ForConditionalGeneration(case.config, _do_init=False)
  other.params = case.params
  other.generation_config.max_new_tokens = 6
  expected = case['generate_greedy_ids'][:, :7]
  for written in (
      other.generate(ids), model.generate(ids, {'max_length': 7}),
      model.generate(ids, GenerationConfig(max_length=7))):
    np.testing.assert_array_equal(written.sequences, expected)
