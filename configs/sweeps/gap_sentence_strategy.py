r"""How the sentences to predict are chosen.

Command: python -m longt5_flax.sweep configs/sweeps/gap_sentence_strategy.py \
  --config.data.path=books.jsonl.xz --config.data.vocabulary=m.model \
  --config.data.validation_path=held_out.jsonl.xz
Hardware: one GPU of 80 GB.
Budget: see attention_type.py. Every run is compared by every strategy.
"""

from configs.sweeps import attention_type
from longt5_flax.sweep_plan import Sweep

RUNS = [(name, {'gap_sentences.strategy': name}) for name in (
    'dynamic_rouge', 'rouge', 'greedy_rouge', 'lead', 'random')]


def get_sweep():
  return Sweep(attention_type.CONFIG, RUNS, attention_type.COMMON, RUNS)
