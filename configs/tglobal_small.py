r"""Gap-sentence pretraining of tglobal-small: 4096 -> 910 tokens, batch 128.

Reproduces: the published configuration of size small; no weights of it were
  released.
Command: python train.py --config=configs/tglobal_small.py
  and on text of your own: python train.py --config=configs/tglobal_small.py \
  --config.data.source=jsonl --config.data.path=books.jsonl.xz \
  --config.data.vocabulary=m.model
Hardware: not measured.
Expect: nothing close to the published scores from a corpus smaller than C4 or
  from fewer steps. Not run to its end by us.
"""

from configs import c4


def get_config():
  config = c4.get_config('tglobal-small')
  config.precision.remat = 'dots'
  return config
