r"""Gap-sentence pretraining of tglobal-large: 4096 -> 910 tokens, batch 128.

Reproduces: LongT5 large, transient-global attention: 780M parameters, 1M steps
  of C4. Published ROUGE-1/2/Lsum after fine-tuning: arXiv 48.28/21.63/44.11 and
  PubMed 49.98/24.69/46.46 at 16,384 tokens, MultiNews 47.18/18.44/24.18 at
  8192.
Command: python train.py --config=configs/tglobal_large.py
  and on text of your own: python train.py --config=configs/tglobal_large.py \
  --config.data.source=jsonl --config.data.path=books.jsonl.xz \
  --config.data.vocabulary=m.model
Hardware: not measured; several devices, of which --config.mesh.fsdp=8 splits
  parameters and optimizer as well as the batch.
Expect: nothing close to the published scores from a corpus smaller than C4 or
  from fewer steps. Not run to its end by us.
"""

from configs import c4


def get_config():
  return c4.get_config('tglobal-large')
