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

from configs import base


def get_config():
  config = base.get_config()
  config.model.preset = 'local-base'
  config.data.source = 'seqio'
  config.data.task = 'longt5_c4_gap_sentences'
  config.data.validation_split = 'validation'
  config.eval.max_batches = 10
  config.precision.remat = 'layer'
  return config
