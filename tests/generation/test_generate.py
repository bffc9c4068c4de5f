"""Decoding with LongT5: golden sequences, and what goes in and out."""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import generation_reference
import golden
import runs
import toy_decoder
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.generation.generate import generate, start_tokens
from longt5_flax.generation.options import GenerationError, GenerationOptions
from longt5_flax.interop.layers import stack_layers
from longt5_flax.model import decoding

GOLDEN = [name for name in golden.names('hf_')
          if golden.load(name).get('generate_greedy_ids') is not None]
BEAMS = {'max_length': 21, 'num_beams': 3, 'length_penalty': 0.8,
         'num_return_sequences': 3}


def write(model, params, tokens, mask, prompt, options):
  encoded = model.apply({'params': params}, tokens, mask, method='encode')
  return generate(
      partial(decoding.step, model, params), decoding.reorder,
      decoding.start(model, params, encoded, mask, options.max_length - 1,
                     options.rows_per_input), prompt, options)


compiled = golden.jit(write, static_argnums=(0, 5))


@functools.cache
def model_of(name):
  """Half of the cases with stacked layers."""
  case = golden.load(name)
  scan_layers = GOLDEN.index(name) % 2 == 1
  params = stack_layers(case.params) if scan_layers else case.params
  model = LongT5ForConditionalGeneration(case.config, scan_layers=scan_layers)
  return case, model, params


def written(name, options):
  case, model, params = model_of(name)
  prompt = start_tokens(len(case['input_ids']), options)
  return case, compiled(model, params, case['input_ids'],
                        case['attention_mask'], prompt, options)


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_greedy(name):
  case, result = written(name, GenerationOptions(max_length=21))
  np.testing.assert_array_equal(result.sequences, case['generate_greedy_ids'])
  assert result.scores is None


@pytest.mark.parametrize('name', GOLDEN)
@pytest.mark.parametrize('early_stopping', [False, True, 'never'])
def test_golden_beams(name, early_stopping):
  """All three hypotheses where they are there, and always the best."""
  case, result = written(
      name, GenerationOptions(early_stopping=early_stopping, **BEAMS))
  for key, rows in ((f'beam_return3_es_{early_stopping}', slice(None)),
                    (f'beam_es_{early_stopping}', slice(None, None, 3))):
    ids = case.get(f'generate_{key.lower()}_ids')
    if ids is not None:
      np.testing.assert_array_equal(result.sequences[rows], ids)
      np.testing.assert_allclose(
          result.scores[rows], case[f'generate_{key.lower()}_sequences_scores'],
          rtol=0, atol=1e-4)


CONFIG = LongT5Config(
    vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
    local_radius=7, global_block_size=4,
    feed_forward_proj='gated-gelu', tie_word_embeddings=False,
    encoder_attention_type='transient-global')
LENGTHS = np.array([37, 20, 3])
MASK = (np.arange(37) < LENGTHS[:, None]).astype(np.int32)
TOKENS = np.random.default_rng(0).integers(2, 40, size=MASK.shape) * MASK
PROMPT = np.array([[0, 5, 9], [0, 30, 2], [0, 7, 7]])
OPTIONS = GenerationOptions(
    max_length=12, num_beams=3, num_return_sequences=2,
    eos_token_ids=(1, 13), no_repeat_ngram_size=2, length_penalty=0.6)


@functools.cache
def small(dtype=jnp.float32):
  model = LongT5ForConditionalGeneration(CONFIG, dtype=dtype)
  return model, golden.random_params(model, TOKENS, PROMPT)


# (params, tokens, mask, targets) -> float32 logits.
teacher = golden.jit(lambda params, tokens, mask, targets: small()[0].apply(
    {'params': params}, tokens, targets, encoder_segment_ids=mask))


def test_prompts_of_longt5_equal_the_reference():
  model, params = small()
  result = compiled(model, params, TOKENS, MASK, PROMPT, OPTIONS)

  def logits_of(i, tokens):
    """Of all targets at once; those that come later do not matter."""
    targets = np.zeros((1, OPTIONS.max_length), int)
    targets[0, :len(tokens)] = tokens
    rows = slice(i, i + 1)
    return np.asarray(teacher(
        params, TOKENS[rows], MASK[rows], targets))[0, len(tokens) - 1]

  expected = [generation_reference.generate(
      partial(logits_of, i), list(prompt), OPTIONS)
              for i, prompt in enumerate(PROMPT)]
  np.testing.assert_array_equal(
      result.sequences, [row for rows, _ in expected for row in rows])
  np.testing.assert_allclose(
      result.scores, [score for _, scores in expected for score in scores],
      rtol=0, atol=1e-4)


def test_an_input_alone_and_padded_further():
  model, params = small()
  together = compiled(model, params, TOKENS, MASK, PROMPT, OPTIONS)
  padding = ((0, 0), (0, 19))
  for i in range(len(TOKENS)):
    row = slice(i, i + 1)
    alone = compiled(model, params, np.pad(TOKENS[row], padding),
                     np.pad(MASK[row], padding), PROMPT[row], OPTIONS)
    rows = slice(2 * i, 2 * i + 2)
    np.testing.assert_array_equal(alone.sequences, together.sequences[rows])
    golden.assert_close(alone.scores, together.scores[rows], what='scores')


@pytest.mark.parametrize('dtype, tolerance', [
    (jnp.bfloat16, 0.05), (jnp.float16, 0.005)])
def test_narrow_dtypes(dtype, tolerance):
  """A hypothesis' score is nearly its log-probability in float32."""
  model, params = small(dtype)
  options = GenerationOptions(max_length=12, num_beams=3)
  result = compiled(model, params, TOKENS, MASK, PROMPT[:, :1], options)
  logits = np.asarray(teacher(params, TOKENS, MASK, result.sequences))
  for i, row in enumerate(np.asarray(result.sequences)):
    count = np.flatnonzero(np.append(row[1:-1] == 1, True))[0] + 1
    scores = [generation_reference.log_softmax(logits[i, j])[row[j + 1]]
              for j in range(count)]
    assert 0 < abs(result.scores[i] - np.mean(scores)) < tolerance


def test_stops_when_all_rows_are_done():
  """Rows that end after 3 and 5 tokens take 5 steps, of 99 possible."""
  steps = []

  def step(cache, tokens):
    jax.debug.callback(steps.append, 1)
    is_last = cache + 1 >= jnp.array([3, 5]).repeat(len(tokens) // 2)
    logits = jnp.where(is_last[:, None] == (jnp.arange(8) == 1), 20.0, 0.0)
    return logits + jnp.arange(8), cache + 1

  for options in ({}, {'num_beams': 2},
                  {'num_beams': 2, 'early_stopping': True}):
    options = GenerationOptions(max_length=100, **options)
    steps.clear()
    result = generate(
        step, lambda cache, rows: cache[rows],
        jnp.zeros(2 * options.rows_per_input, int), start_tokens(2, options),
        options)
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert result.sequences.shape == (2, 100)
    np.testing.assert_array_equal(
        jnp.argmax(result.sequences == 1, axis=1), [3, 5])
    assert len(steps) == 5


@pytest.mark.parametrize('options, message', [
    ({'max_length': 3}, 'max_length=3 must be greater than the length of the '
     'prompt, 3'),
    ({'do_sample': True}, 'do_sample=True must come with a random key'),
    ({'eos_token_ids': (1, 16)},
     r'eos_token_ids=\(1, 16\) must be below the vocabulary size, 16'),
    ({'eos_token_ids': (1, 16), 'num_beams': 2}, 'must be below the voc'),
])
def test_refused(options, message):
  with pytest.raises(GenerationError, match=message):
    toy_decoder.write(
        toy_decoder.weights(0, 2), PROMPT[:2], GenerationOptions(**options))


def test_the_program_of_the_page():
  page = (runs.ROOT / 'docs' / 'generation.md').read_text('utf-8')
  [program] = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  found = {'jit': golden.jit}
  exec(program.replace('jax.jit', 'jit'), found)
  assert found['sequences'].shape == (2, 8)
  assert found['scores'].shape == (2,)
