r"""How far the encoder looks, and how many tokens a global token sums up.

Command: python -m longt5_flax.sweep configs/sweeps/radius_and_block_size.py \
  --config.data.path=books.jsonl.xz --config.data.vocabulary=m.model \
  --config.data.validation_path=held_out.jsonl.xz
Hardware: one GPU of 80 GB.
Budget: see attention_type.py. Examples of a row start at multiples of the block
  size, so that rows differ a little between block sizes.
"""

from configs.sweeps import attention_type
from longt5_flax.sweep_plan import Sweep


def get_sweep():
  return Sweep(
      attention_type.CONFIG,
      [(f'r{radius}-k{block}', {'model.local_radius': radius,
                                   'model.global_block_size': block})
       for radius in (63, 127, 255) for block in (8, 16, 32)],
      attention_type.COMMON)
