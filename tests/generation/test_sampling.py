"""Greedy decoding and sampling of a toy decoder."""

import random

import jax
import numpy as np
import pytest

import generation_reference
import golden
import toy_decoder
from longt5_flax.generation.options import GenerationOptions

INPUTS = 4
START = np.zeros((INPUTS, 1), int)
write = golden.jit(toy_decoder.write, static_argnums=2)


@pytest.mark.parametrize('seed', range(8))
def test_greedy(seed):
  pick = random.Random(seed)
  prompt_length = pick.choice([1, 3])
  options = GenerationOptions(
      max_length=12, min_length=pick.choice([0, 5]),
      no_repeat_ngram_size=pick.choice([0, 2]),
      repetition_penalty=pick.choice([1.0, 1.4]),
      eos_token_ids=pick.choice([(1,), (3, 1, 4), ()]),
      pad_token_id=pick.choice([0, 2]),
      forced_eos_token_id=pick.choice([None, 1]))
  for seed in range(10):
    prompt = np.random.default_rng(seed).integers(
        toy_decoder.VOCABULARY, size=(INPUTS, prompt_length))
    weights = toy_decoder.weights(seed, INPUTS)
    written = write(weights, prompt, options)
    np.testing.assert_array_equal(
        written.sequences, toy_decoder.expected(weights, prompt, options)[0])
    assert written.scores is None


SAMPLING = GenerationOptions(
    max_length=6, do_sample=True, temperature=1.3, top_k=5, top_p=0.9,
    no_repeat_ngram_size=2, num_return_sequences=500)


def test_draws_follow_the_distribution():
  """After every beginning, and those that are drawn often make it a test."""
  weights = toy_decoder.weights(0, INPUTS)
  draws = np.asarray(write(weights, START, SAMPLING,
                           jax.random.key(0)).sequences)
  checked = 0
  for i, rows in enumerate(draws.reshape(INPUTS, 500, -1)):
    for beginning in {tuple(row[:n]) for row in rows for n in range(1, 6)}:
      length, tokens = len(beginning), list(beginning)
      is_so = (rows[:, :length] == beginning).all(axis=1)
      if 1 in beginning:
        assert not rows[is_so, length:].any()
        continue
      shares = np.exp(generation_reference.log_softmax(
          drawn_from(weights, i, tokens, SAMPLING)))
      count = is_so.sum()
      found = np.bincount(rows[is_so, length], minlength=len(shares)) / count
      # Five standard deviations, and nothing where the share is 0.
      assert (np.abs(found - shares) <= 5 * np.sqrt(shares / count)).all()
      checked += count >= 100
  assert checked > 10


def test_a_key_fixes_the_draws():
  weights = toy_decoder.weights(0, INPUTS)
  first, again, other = (
      np.asarray(write(weights, START, SAMPLING, key).sequences)
      for key in (jax.random.key(3), jax.random.key(3), jax.random.key(4)))
  np.testing.assert_array_equal(first, again)
  assert (first != other).any(axis=1).mean() > 0.5
  # The draws of one input are not alike.
  assert len(np.unique(first[:500], axis=0)) > 50


def test_rows_do_not_depend_on_each_other():
  weights = toy_decoder.weights(0, INPUTS)
  key = jax.random.key(0)
  together = write(weights, START, SAMPLING, key).sequences
  fewer = write({**weights, 'context': weights['context'][:2]}, START[:2],
                SAMPLING, key).sequences
  np.testing.assert_array_equal(fewer, together[:1000])


@pytest.mark.parametrize('beams', [1, 3])
def test_sampling_a_peaked_distribution_is_a_search(beams):
  """Drawing at a temperature near 0 takes the best; scores are divided by
  it."""
  weights = toy_decoder.weights(1, INPUTS)
  options = {'max_length': 8, 'num_beams': beams, 'length_penalty': 0.0}
  searched = write(weights, START, GenerationOptions(**options))
  drawn = write(weights, START, GenerationOptions(
      do_sample=True, temperature=1e-4, top_k=0, **options),
                jax.random.key(0))
  np.testing.assert_array_equal(drawn.sequences, searched.sequences)
  if beams > 1:
    np.testing.assert_allclose(drawn.scores * 1e-4, searched.scores, rtol=1e-4)


def test_beams_are_drawn():
  """Other keys, other hypotheses; all differ, and the best is first. A score
  does not know what may not be drawn."""
  weights = toy_decoder.weights(1, INPUTS)
  options = GenerationOptions(
      max_length=5, num_beams=3, num_return_sequences=3, do_sample=True,
      top_k=6, eos_token_ids=())
  seen = set()
  for seed in range(20):
    written = write(weights, START, options, jax.random.key(seed))
    rows = np.asarray(written.sequences).reshape(INPUTS, 3, -1).tolist()
    scores = np.asarray(written.scores).reshape(INPUTS, 3)
    assert (np.diff(scores) <= 0).all()
    for i in range(INPUTS):
      assert len({tuple(row) for row in rows[i]}) == 3
      for row, score in zip(rows[i], scores[i], strict=True):
        np.testing.assert_allclose(
            score, log_probability(weights, i, row, options), rtol=1e-4)
    seen.add(str(rows))
  assert len(seen) > 10


def log_probability(weights, i, row, options):
  scores = [drawn_from(weights, i, row[:length], options)[row[length]]
            for length in range(1, len(row))]
  return np.mean(scores)


def drawn_from(weights, i, tokens, options):
  """Log-probabilities of what follows, without what may not be drawn."""
  scores = generation_reference.log_softmax(
      toy_decoder.logits_of(weights, i, tokens))
  return generation_reference.restrict_draw(
      generation_reference.adjust_scores(scores, tokens, options), options)
