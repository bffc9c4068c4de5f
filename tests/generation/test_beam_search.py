"""Beam search of a toy decoder, against loops over lists."""

import random

import jax
import numpy as np
import pytest

import golden
import toy_decoder
from longt5_flax.generation import beam_search
from longt5_flax.generation.options import GenerationOptions

INPUTS = 4
write = golden.jit(toy_decoder.write, static_argnums=2)


def check(options, prompt_length, seeds):
  """Many models, whose sequences end early, late and never."""
  lengths = set()
  for seed in seeds:
    prompt = np.random.default_rng(seed).integers(
        toy_decoder.VOCABULARY, size=(INPUTS, prompt_length))
    weights = toy_decoder.weights(seed, INPUTS)
    written = write(weights, prompt, options)
    sequences, scores = toy_decoder.expected(weights, prompt, options)
    np.testing.assert_array_equal(written.sequences, sequences, str(seed))
    np.testing.assert_allclose(written.scores, scores, atol=1e-4, rtol=1e-5)
    lengths |= {length_of(row, options) for row in sequences}
  return lengths


def length_of(row, options):
  """Tokens before the filler; one that was written counts as filler."""
  return next((i for i in range(len(row), 0, -1) if row[i - 1] != row[-1]), 0)


@pytest.mark.parametrize('early_stopping', [True, False, 'never'])
@pytest.mark.parametrize('length_penalty', [-1.0, 0.0, 2.0])
def test_when_it_stops(early_stopping, length_penalty):
  options = GenerationOptions(
      max_length=12, num_beams=3, num_return_sequences=3,
      early_stopping=early_stopping, length_penalty=length_penalty)
  lengths = check(options, 1, range(20))
  assert min(lengths) < 5
  assert max(lengths) > 9


def test_enough_go_on_where_most_tokens_end():
  check(GenerationOptions(
      max_length=8, num_beams=4, num_return_sequences=4, length_penalty=2.0,
      early_stopping='never', eos_token_ids=tuple(range(1, 12))), 1, range(10))


@pytest.mark.parametrize('seed', range(25))
def test_random_options(seed):
  pick = random.Random(seed)
  beams = pick.randint(2, 4)
  prompt_length = pick.choice([1, 1, 2, 4])
  check(GenerationOptions(
      max_length=prompt_length + pick.choice([3, 6, 9]),
      min_length=pick.choice([0, 0, 4, 7]),
      num_beams=beams, num_return_sequences=pick.randint(1, beams),
      length_penalty=pick.choice([-0.5, 0.0, 0.6, 1.0, 1.5]),
      early_stopping=pick.choice([True, False, 'never']),
      no_repeat_ngram_size=pick.choice([0, 0, 1, 2, 3]),
      repetition_penalty=pick.choice([1.0, 1.0, 0.8, 1.4]),
      eos_token_ids=pick.choice(
          [(1,), (1,), (3, 1, 4), tuple(range(1, 8)), ()]),
      pad_token_id=pick.choice([0, 0, 2]),
      forced_bos_token_id=pick.choice([None, None, 7]),
      forced_eos_token_id=pick.choice([None, None, 1])), prompt_length,
        range(100 * seed, 100 * seed + 6))


def test_inputs_do_not_depend_on_each_other():
  options = GenerationOptions(
      max_length=12, num_beams=3, num_return_sequences=2)
  prompt = np.zeros((INPUTS, 1), int)
  weights = toy_decoder.weights(0, INPUTS)
  together = write(weights, prompt, options)
  for i in range(INPUTS):
    alone = write({**weights, 'context': weights['context'][i:i + 1]},
                  prompt[:1], options)
    rows = slice(2 * i, 2 * i + 2)
    np.testing.assert_array_equal(alone.sequences, together.sequences[rows])
    np.testing.assert_allclose(
        alone.scores, together.scores[rows], rtol=1e-6)


@pytest.mark.parametrize('n', [96, 768, 4 * 32128, 4 * 32101])
def test_largest(n):
  draw = np.random.default_rng(n)
  x = draw.standard_normal((3, n)).astype(np.float32)
  x[1] = draw.integers(3, size=n)  # Many are equal.
  x[2, draw.random(n) < 0.999] = -np.inf
  for got, wanted in zip(beam_search.largest(jax.numpy.asarray(x), 12),
                         jax.lax.top_k(x, 12), strict=True):
    np.testing.assert_array_equal(got, wanted)
