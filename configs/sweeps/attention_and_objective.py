r"""attention_type.py and objective.py in one, their common run not repeated.

Command: python -m longt5_flax.sweep \
  configs/sweeps/attention_and_objective.py \
  --config.data.path=books.jsonl.xz --config.data.vocabulary=m.model \
  --config.data.validation_path=held_out.jsonl.xz
Hardware: one GPU of 80 GB.
Budget: see attention_type.py.
"""

from configs.sweeps import attention_type, objective
from longt5_flax.sweep_plan import Sweep


def get_sweep():
  return Sweep(
      attention_type.CONFIG,
      [('transient-global-rouge', {}), *attention_type.OTHERS,
       *objective.OTHERS],
      attention_type.COMMON, objective.HELD_OUT)
