r"""Gap-sentence pretraining of tglobal-xl: 4096 -> 910 tokens, batch 128.

Reproduces: LongT5 xl, transient-global attention: 3B parameters, 1M steps of
  C4. Published ROUGE-1/2/Lsum after fine-tuning at 16,384 tokens: arXiv
  48.35/21.92/44.27, PubMed 50.23/24.76/46.67.
Command: python train.py --config=configs/tglobal_xl.py
  and on text of your own: python train.py --config=configs/tglobal_xl.py \
  --config.data.source=jsonl --config.data.path=books.jsonl.xz \
  --config.data.vocabulary=m.model
Hardware: not measured; a pod slice. Parameters and
  batch are split over mesh.fsdp=8.
Expect: nothing close to the published scores from a corpus smaller than C4 or
  from fewer steps. Not run to its end by us.
"""

from configs import c4


def get_config():
  config = c4.get_config('tglobal-xl')
  config.mesh.fsdp = 8
  return config
