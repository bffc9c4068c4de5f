r"""Gap-sentence pretraining of local-base: 4096 -> 910 tokens, batch 128.

Reproduces: LongT5 base with local attention only: the paper's ablation of
  global tokens.
Command: python train.py --config=configs/local_base.py
  and on text of your own: python train.py --config=configs/local_base.py \
  --config.data.source=jsonl --config.data.path=books.jsonl.xz \
  --config.data.vocabulary=m.model
Hardware: As tglobal_base.py, and less memory.
Expect: nothing close to the published scores from a corpus smaller than C4 or
  from fewer steps. Not run to its end by us.
"""

from configs import c4


def get_config():
  return c4.get_config('local-base')
