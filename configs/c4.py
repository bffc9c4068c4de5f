r"""LongT5's published pretraining on C4: 4096 -> 910 tokens, batch 128.

Reproduces: LongT5 (Guo et al. 2021, arXiv 2112.07916), section 4.1, at the size
  that the argument names; configs/{tglobal,local,full}_SIZE.py are this one.
Command: python train.py --config=configs/c4.py:mlongt5-base
  and on text of your own: python train.py --config=configs/c4.py:mlongt5-base \
  --config.data.source=jsonl --config.data.path=books.jsonl.xz \
  --config.data.vocabulary=m.model
Hardware: see the file of each size.
"""

from configs import base


def get_config(preset='tglobal-base'):
  config = base.get_config()
  config.model.preset = preset
  config.data.source = 'seqio'
  config.data.task = 'longt5_c4_gap_sentences'
  config.data.validation_split = 'validation'
  config.eval.max_batches = 10
  config.precision.remat = 'layer'
  return config
