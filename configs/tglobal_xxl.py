r"""Gap-sentence pretraining of tglobal-xxl: 4096 -> 910 tokens, batch 128.

Reproduces: the published configuration of size xxl (11B parameters); no weights
  of it were released.
Command: python train.py --config=configs/tglobal_xxl.py
  and on text of your own: python train.py --config=configs/tglobal_xxl.py \
  --config.data.source=jsonl --config.data.path=books.jsonl.xz \
  --config.data.vocabulary=m.model
Hardware: a pod slice. Parameters and batch are split over mesh.fsdp=16.
Expect: nothing close to the published scores from a corpus smaller than C4 or
  from fewer steps. Not run to its end by us.
"""

from configs import c4


def get_config():
  config = c4.get_config('tglobal-xxl')
  config.mesh.fsdp = 16
  return config
