r"""What is predicted: sentences chosen by ROUGE or at random, or spans.

Command: python -m longt5_flax.sweep configs/sweeps/objective.py \
  --config.data.path=books.jsonl.xz --config.data.vocabulary=m.model \
  --config.data.validation_path=held_out.jsonl.xz
Hardware: one GPU of 80 GB.
Budget: see attention_type.py; rows and lengths are the same for all objectives,
  and how many of their tokens are real is in the table. The training losses of
  objectives cannot be compared: the table has each run's held-out loss by
  every objective.
"""

from configs.sweeps import attention_type
from longt5_flax.sweep_plan import Sweep

RANDOM = {'gap_sentences.strategy': 'random'}
SPANS = {'data.objective': 'span_corruption'}

OTHERS = [
    ('random', RANDOM),
    ('span-corruption', SPANS),
    ('mix', {'data.objective': 'gap_sentences:1,span_corruption:1'}),
]
HELD_OUT = [('rouge', {}), ('random', RANDOM), ('span-corruption', SPANS)]


def get_sweep():
  return Sweep(attention_type.CONFIG, [('rouge', {}), *OTHERS],
               attention_type.COMMON, HELD_OUT)
