r"""Gap-sentence pretraining of full-base: 4096 -> 910 tokens, batch 128.

Reproduces: T5.1.1 base under LongT5's pretraining: the baseline of full
  attention. Memory grows with the square of the input.
Command: python train.py --config=configs/full_base.py
  and on text of your own: python train.py --config=configs/full_base.py \
  --config.data.source=jsonl --config.data.path=books.jsonl.xz \
  --config.data.vocabulary=m.model
Hardware: not measured.
Expect: nothing close to the published scores from a corpus smaller than C4 or
  from fewer steps. Not run to its end by us.
"""

from configs import c4


def get_config():
  return c4.get_config('full-base')
