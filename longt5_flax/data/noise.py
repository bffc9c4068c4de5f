"""The noise that PEGASUS adds to sentences' scores: a table of its C++ library.

It starts a default engine anew for each document, so that noise depends on a
sentence's position and the library alone.
"""

import functools
import math

import numpy as np

# C++ library: its random engine's multiplier, its order of a pair of normals.
_ENGINES = {'libcxx': (48271, 1), 'libstdcxx': (16807, -1)}
NOISES = (None, *_ENGINES)


@functools.cache
def noise_table(library: str, size: int, noise_ratio: float) -> np.ndarray:
  """[size] float64: std::normal_distribution over a default engine."""
  multiplier, order = _ENGINES[library]
  modulus, span, state = 2**31 - 1, 2.0**31 - 2, 1
  normals: list[float] = []
  while len(normals) < size:
    pair = []
    for _ in range(2):
      low = state * multiplier % modulus
      state = low * multiplier % modulus
      pair.append(2 * ((low - 1 + (state - 1) * span) / (span * span)) - 1)
    square = pair[0] * pair[0] + pair[1] * pair[1]
    if 0 < square <= 1:
      scale = math.sqrt(-2 * math.log(square) / square)
      normals += [x * scale for x in pair[::order]]
  table = np.array(normals[:size]) * float(np.float32(noise_ratio))
  table.setflags(write=False)  # every caller gets the same one
  return table


def add_noise(
    scores: np.ndarray, library: str | None, noise_ratio: float) -> np.ndarray:
  """[N] float32: scores [N] times 1 + noise_ratio * noise; None adds none."""
  if library is None:
    return scores
  size = max(1024, 1 << len(scores).bit_length())  # few tables serve all
  noise = noise_table(library, size, noise_ratio)[:len(scores)]
  noisy = scores * (1 + float(np.float32(noise_ratio)) * noise)
  return noisy.astype(np.float32)
