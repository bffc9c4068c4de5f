"""Compiles the models' programs as tests do: quickly."""

import jax
import pytest

import golden
from longt5_flax.api import programs


@pytest.fixture(autouse=True, scope='module')
def quick_programs():
  with pytest.MonkeyPatch.context() as patch:
    for name, static in (('init', (0, 1)), ('apply', (0, 1, 2)),
                         ('init_cache', (0, 1)), ('write', (0, 1)),
                         ('write_first', (0, 1)), ('write_next', (0, 1))):
      patch.setattr(programs, name, quick(getattr(programs, name), static))
    yield


def quick(program, static):
  """The program; inside another one, where there are no options, as it is."""
  compiled = golden.jit(program.__wrapped__, static_argnums=static)

  def call(*args, **kwargs):
    leaves = jax.tree.leaves((args[len(static):], kwargs))
    inside = any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
    return (program if inside else compiled)(*args, **kwargs)

  return call
