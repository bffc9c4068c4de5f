"""What options do to scores, against loops over lists."""

import jax.numpy as jnp
import numpy as np
import pytest

import generation_reference
import golden
from longt5_flax.generation.options import GenerationOptions
from longt5_flax.generation.scores import adjust_scores, ends, restrict_draw

VOCABULARY = 11
adjust = golden.jit(adjust_scores, static_argnums=3)
restrict = golden.jit(restrict_draw, static_argnums=1)


def random_scores(seed, rows=6):
  return 3 * np.random.default_rng(seed).standard_normal(
      (rows, VOCABULARY)).astype(np.float32)


@pytest.mark.parametrize('options', [
    {'repetition_penalty': 1.7}, {'repetition_penalty': 0.5},
    {'no_repeat_ngram_size': 1}, {'no_repeat_ngram_size': 2},
    {'no_repeat_ngram_size': 3}, {'no_repeat_ngram_size': 12},
    {'min_length': 4}, {'min_length': 4, 'eos_token_ids': (1, 5)},
    {'min_length': 4, 'eos_token_ids': ()},
    {'forced_bos_token_id': 7}, {'forced_eos_token_id': 1},
    {'min_length': 9, 'no_repeat_ngram_size': 1, 'repetition_penalty': 1.7,
     'forced_bos_token_id': 3, 'forced_eos_token_id': 1},
], ids=str)
def test_adjusted_scores(options):
  """At every length; few different tokens, so that n-grams repeat."""
  options = GenerationOptions(max_length=10, **options)
  scores = random_scores(1)
  tokens = np.random.default_rng(2).integers(3, size=(len(scores), 10))
  for length in range(1, 10):
    actual = adjust(scores, tokens, jnp.asarray(length), options)
    expected = [generation_reference.adjust_scores(
        row, list(sequence[:length]), options)
                for row, sequence in zip(scores, tokens, strict=True)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize('options', [
    {'top_k': 0}, {'top_k': 0, 'temperature': 0.4}, {'top_k': 1},
    {'top_k': 3}, {'top_k': 50}, {'top_k': 0, 'top_p': 0.6},
    {'top_k': 0, 'top_p': 0.0}, {'top_k': 4, 'top_p': 0.8, 'temperature': 2.0},
    {'top_k': 2, 'num_beams': 3, 'eos_token_ids': (1, 2)},
    {'top_k': 0, 'top_p': 0.1, 'num_beams': 3},
], ids=str)
@pytest.mark.parametrize('banned', [False, True])
def test_restricted_draw(options, banned):
  options = GenerationOptions(do_sample=True, **options)
  scores = random_scores(3, rows=50)
  if banned:
    scores[:, 2:7] = -np.inf
  actual = restrict(scores, options)
  for row, expected in zip(actual, scores, strict=True):
    np.testing.assert_allclose(
        row, generation_reference.restrict_draw(expected, options), rtol=1e-6)


def test_equal_scores_are_kept_or_dropped_together():
  scores = jnp.array([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]])
  for options in ({'top_k': 3}, {'top_k': 0, 'top_p': 0.6}):
    kept = restrict(scores, GenerationOptions(do_sample=True, **options))
    assert np.isfinite(kept).tolist() == [[0, 1, 1, 1, 1, 0]]


def test_ends():
  tokens = jnp.array([[0, 1, 5], [9, 5, 1]])
  assert ends(tokens, GenerationOptions(eos_token_ids=(1, 5))).tolist() == [
      [False, True, True], [False, True, True]]
  assert not ends(tokens, GenerationOptions(eos_token_ids=())).any()
