r"""Which attention the encoder has: transient-global, full or local.

Command: python -m longt5_flax.sweep configs/sweeps/attention_type.py \
  --config.data.path=books.jsonl.xz --config.data.vocabulary=m.model \
  --config.data.validation_path=held_out.jsonl.xz
Hardware: one GPU of 80 GB; full attention takes the most of it.
Budget: 600 steps of 16 rows each, 4096 -> 910: minutes a run, far too short for
  a verdict on models that are trained for a million steps.
"""

from longt5_flax.sweep_plan import Sweep

# Of every sweep in this folder.
CONFIG = 'configs/tglobal_small.py'
COMMON = {
    'steps': 600,
    'log_every_steps': 10,
    'data.source': 'jsonl',
    'data.batch_size': 16,
    'data.long_documents': 'pieces',
    'checkpoint.every_steps': 300,
    'checkpoint.keep': 1,
    'eval.every_steps': 200,
}

OTHERS = [(name, {'model.encoder_attention_type': name})
          for name in ('full', 'local')]


def get_sweep():
  return Sweep(CONFIG, [('transient-global', {}), *OTHERS], COMMON)
