"""Learning rates as functions of the step, counted from 0."""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from longt5_flax.config import ConfigError

SCHEDULES = ('rsqrt', 'constant', 'linear', 'cosine')
# Those that depend on how long the run is.
DECAYING = ('linear', 'cosine')

# t5x's floor.
_MIN_LEARNING_RATE = 1e-8


def make_schedule(
    name: str, learning_rate: float, warmup_steps: int, steps: int
) -> Callable[[Array], Float[Array, '']]:
  """A learning rate schedule.

  Args:
    name: 'rsqrt' is T5's pretraining schedule,
      learning_rate / sqrt(max(step, warmup_steps)): its "warm-up" is a
      plateau. 'constant', 'linear' and 'cosine' rise linearly from
      learning_rate / warmup_steps over the first `warmup_steps`; then they
      stay, or fall to 0 at `steps` along a line or half a cosine.
    learning_rate: the peak; for 'rsqrt' the numerator.
    warmup_steps: see above; 0 for none.
    steps: where 'linear' and 'cosine' end.

  Raises:
    ConfigError: an unknown name, or a warm-up longer than the run.
  """
  if name not in SCHEDULES:
    raise ConfigError(f'schedule.name={name!r} must be one of {SCHEDULES}.')
  if not 0 < learning_rate < math.inf:
    raise ConfigError(f'schedule.learning_rate={learning_rate} must be > 0 '
                      'and finite.')
  if warmup_steps < 0:
    raise ConfigError(f'schedule.warmup_steps={warmup_steps} must be >= 0.')
  if name in DECAYING and warmup_steps >= steps:
    raise ConfigError(f'schedule.warmup_steps={warmup_steps} must be less '
                      f'than steps={steps} for schedule.name={name!r}.')

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    if name == 'rsqrt':
      rate = learning_rate / jnp.sqrt(jnp.maximum(step, max(warmup_steps, 1)))
    else:
      rate = learning_rate * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))
      done = (step - warmup_steps) / max(steps - warmup_steps, 1)
      done = jnp.clip(done, 0.0, 1.0)
      if name == 'linear':
        rate *= 1.0 - done
      elif name == 'cosine':
        rate *= 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    return jnp.maximum(rate, _MIN_LEARNING_RATE)

  return schedule
