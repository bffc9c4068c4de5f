r"""Do implementations of attention train alike?

The same 200 steps with the reference, with the reference summed in another
order (two microbatches), in chunks, and in kernels.

Command: python -m longt5_flax.sweep configs/sweeps/implementation.py \
  --config.data.path=books.jsonl.xz --config.data.vocabulary=m.model
  and then python -m benchmarks.loss_differences with the folders of the runs
Hardware: one GPU of 80 GB; kernels need one, the other runs do not.
Expect: losses with kernels as far from the reference as those of the second
  run, within a factor of two.
"""

from configs.sweeps import attention_type
from longt5_flax.sweep_plan import Sweep


def get_sweep():
  def run(attention, **overrides):
    return {'precision.attention': attention} | overrides

  return Sweep(
      attention_type.CONFIG,
      [('reference', run('reference')),
       ('other-order', run('reference', **{'optimizer.microbatches': 2})),
       ('chunked', run('chunked')),
       ('fused', run('fused'))],
      attention_type.COMMON | {'steps': 200, 'log_every_steps': 1})
