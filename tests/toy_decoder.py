"""A decoder small enough to write down twice, to test decoding loops with.

Its state is a fading sum of the tokens so far: every token counts, and a row
that goes on with another's cache is found out.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

import generation_reference
from longt5_flax.generation.generate import Generated, generate
from longt5_flax.generation.options import GenerationOptions

VOCABULARY = 16
SIZE = 8
FADING = -0.8


def weights(seed: int, inputs: int, scale: float = 0.5) -> dict[str, Any]:
  """Random ones, and a context for each input; larger logits by `scale`."""
  generator = np.random.default_rng(seed)
  return {
      'embedding': generator.standard_normal((VOCABULARY, SIZE)),
      'output': scale * generator.standard_normal((SIZE, VOCABULARY)),
      'context': generator.standard_normal((inputs, SIZE))}


def logits_of(weights: dict[str, Any], i: int,
              tokens: list[int]) -> np.ndarray:
  """What follows the tokens, for input i; double precision."""
  state = 0.0
  for token in tokens:
    state = FADING * state + weights['embedding'][token]
  return (state + weights['context'][i]) @ weights['output']


def expected(
    weights: dict[str, Any], prompt: Any, options: GenerationOptions
) -> tuple[list[list[int]], list[float]]:
  """The sequences of all inputs, and beams' scores, by the reference."""
  results = [generation_reference.generate(
      lambda tokens, i=i: logits_of(weights, i, tokens), list(start), options)
             for i, start in enumerate(prompt)]
  return ([row for rows, _ in results for row in rows],
          [score for _, scores in results for score in scores])


def write(weights: dict[str, Any], prompt: Any, options: GenerationOptions,
          key: Any = None) -> Generated:
  """The same by longt5_flax."""
  weights = {name: jnp.asarray(value, jnp.float32)
             for name, value in weights.items()}
  rows = len(weights['context']) * options.rows_per_input
  cache = {'weights': weights, 'state': jnp.zeros((rows, SIZE))}
  return generate(step, reorder, cache, jnp.asarray(prompt), options, key)


def step(cache: dict[str, Any], tokens: Any) -> tuple[Any, dict[str, Any]]:
  """As `generate` wants it."""
  weights, state = cache['weights'], cache['state']
  for i in range(tokens.shape[1]):
    state = FADING * state + weights['embedding'][tokens[:, i]]
  context = weights['context'].repeat(
      len(tokens) // len(weights['context']), axis=0)
  return (state + context) @ weights['output'], {**cache, 'state': state}


def reorder(cache: dict[str, Any], rows: Any) -> dict[str, Any]:
  """As `generate` wants it."""
  return {**cache, 'state': cache['state'][rows]}
