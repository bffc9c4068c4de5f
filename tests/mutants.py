"""Breaks the code on purpose and shows that a named test notices.

  python tests/mutants.py            all of them
  python tests/mutants.py radius     those with the word in their name

Each mutant is one replacement, applied to a copy of the repository; its tests
must fail there, and must pass on the copy before any. Run by hand, not in CI.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
  """One break: `old`, found exactly once in `file`, becomes `new`."""
  name: str
  file: str
  old: str
  new: str
  test: str


MUTANTS = [
    # Model.
    Mutant('radius off by one', 'longt5_flax/model/attention.py',
           'np.abs(offsets) < block', 'np.abs(offsets) < block - 1',
           'tests/model/test_attention.py::test_mask_written_out'),
    Mutant('orphan dropped', 'longt5_flax/model/global_tokens.py',
           'jnp.where(positions >= block_size, own - 1, -1)', '-1',
           'tests/model/test_golden_flaxformer.py::test_global_blocks'),
    Mutant('orphan left out of the sum', 'longt5_flax/model/global_tokens.py',
           'jnp.arange(2 * block_size - 1)', 'jnp.arange(block_size)',
           'tests/model/test_golden_flaxformer.py::test_encoder_output'),
    Mutant('gradient of the side bias from one row',
           'longt5_flax/model/global_tokens.py',
           'return jnp.sum(sums, axis=0), None', 'return sums[0], None',
           'tests/model/test_golden_flaxformer.py::test_gradients'),
    Mutant('side offset sign', 'longt5_flax/model/encoder.py',
           'jnp.swapaxes(side_bias, 0, 1))',
           'jnp.transpose(side_bias, (2, 0, 1)))',
           'tests/model/test_golden_flaxformer.py::test_encoder_output'),
    Mutant('bias not shared by the layers', 'longt5_flax/model/layers.py',
           '      carry = call(layer, carry, context)\n',
           '      carry = call(layer, carry, context if layer is layers[0] '
           'else context._replace(bias=context.bias * 0))\n',
           'tests/model/test_golden_flaxformer.py::test_encoder_output'),
    Mutant('globals of other segments seen', 'longt5_flax/model/attention.py',
           'side_mask = _same_segment('
           'segments_BNC, side.segment_ids[:, None])',
           'side_mask = (segments_BNC[..., None] > 0) & '
           '(side.segment_ids[:, None, None] > 0)',
           'tests/model/test_reach.py::test_reach_in_a_packed_row'),
    Mutant('decoder sees one ahead', 'longt5_flax/model/decoder.py',
           'jnp.tril(jnp.ones((1, 1, length, length), bool))',
           'jnp.tril(jnp.ones((1, 1, length, length), bool), 1)',
           'tests/model/test_reach.py'
           '::test_decoder_is_causal_and_sees_the_inputs'),
    Mutant('head not scaled', 'longt5_flax/model/decoder.py',
           'if self.config.scale_decoder_outputs:', 'if False:',
           'tests/model/test_options.py::test_scaling_is_apart_from_tying'),
    Mutant('cache does not move', 'longt5_flax/model/decoder.py',
           'start + embedded.shape[1])', 'start + 0)',
           'tests/model/test_options.py::test_steps_equal_the_whole_target'),
    Mutant('float16 not scaled', 'longt5_flax/model/precision.py',
           'exponent = exponent - _FLOAT16_TOP', 'exponent = exponent * 0',
           'tests/model/test_precision.py::test_close_to_float32'),
    # Objective.
    Mutant('tie broken to the earlier sentence',
           'longt5_flax/data/gap_sentences.py',
           "order = np.argsort(scores, kind='stable')",
           "order = np.argsort(scores[::-1], kind='stable')[::-1]",
           'tests/data/test_gap_sentences.py'
           '::test_all_scores_zero_selects_the_last'),
    Mutant('end of sequence after the cut',
           'longt5_flax/data/gap_sentences.py',
           'ids = itertools.chain.from_iterable(pieces)',
           'ids = [*itertools.chain(*pieces)]; ids[length - 1:-1] = []',
           'tests/data/test_gap_sentences.py::test_eos_goes_before_the_cut'),
    Mutant('mask ratio not drawn', 'longt5_flax/data/gap_sentences.py',
           'float(np.float32(ratio)) * rng.uniform(low, 1.0)',
           'float(np.float32(ratio)) * max(low, 1.0)',
           'tests/data/test_gap_sentences.py'
           '::test_dynamic_ratio_is_drawn_for_dynamic_rouge_only'),
    # Data.
    Mutant('decoder inputs cross segments', 'longt5_flax/data/row_streams.py',
           'targets[:-1] * (segments[1:] == segments[:-1])', 'targets[:-1]',
           'tests/data/test_row_streams.py::test_row'),
    Mutant('stream state not restored', 'longt5_flax/data/row_streams.py',
           "    self._rows.set_state(state['rows'])\n", '',
           'tests/data/test_pipeline.py::test_resumes_after_any_batch'),
    # Loss, optimizer, step.
    Mutant('z-loss left out', 'longt5_flax/training/losses.py',
           'jnp.sum((loss + z_losses) * weights)', 'jnp.sum(loss * weights)',
           'tests/training/test_losses.py::test_equals_t5x_on_its_own_logits'),
    Mutant('layers share one parameter scale',
           'longt5_flax/training/optimizer.py',
           "return names[0] if names[1] == 'layers' else 'unstacked'",
           "return 'unstacked'",
           'tests/training/test_optimizer.py::test_three_steps'),
    Mutant('plateau off by a step', 'longt5_flax/training/schedules.py',
           'jnp.maximum(step, max(warmup_steps, 1))',
           'jnp.maximum(step + 1, max(warmup_steps, 1))',
           'tests/training/test_optimizer.py::test_schedules_are_t5x'),
    Mutant('mean of microbatch means', 'longt5_flax/training/train_step.py',
           '    return sums.loss_sum, sums\n',
           '    return sums.loss_sum / sums.weight_sum, sums\n',
           'tests/training/test_train_step.py'
           '::test_gradient_accumulation_equals_the_large_batch'),
    Mutant('last microbatch left out',
           'longt5_flax/training/train_step.py',
           'rest = jax.tree.map(lambda x: x[1:], parts)',
           'rest = jax.tree.map(lambda x: x[jnp.array([1, 1, 2])], parts)',
           'tests/training/test_train_step.py'
           '::test_gradient_accumulation_equals_the_large_batch'),
    Mutant('same dropout at every step', 'longt5_flax/training/train_step.py',
           'jax.random.fold_in(jax.random.fold_in(dropout_key, step), index)',
           'jax.random.fold_in(dropout_key, index)',
           'tests/training/test_train_step.py'
           '::test_dropout_depends_on_seed_and_step_alone'),
    Mutant('fsdp leaves the optimizer whole',
           'longt5_flax/training/partitioning.py',
           '      return axes[:i] + axes[i + 1:]\n',
           '      return (None,) * len(state_shape)\n',
           'tests/training/test_train_step.py'
           '::test_fsdp_splits_the_optimizer_like_the_parameters'),
    # Loop and resume, in real processes.
    Mutant('streams not restored by the loop', 'train.py',
           '    batches.set_state(streams)\n', '    pass\n',
           'tests/test_resume.py::test_a_killed_run_goes_on_bit_for_bit'),
    Mutant('optimizer not restored', 'train.py',
           '    return checkpoints, *checkpoints.restore(latest, abstract)\n',
           '    state, streams = checkpoints.restore(latest, abstract)\n'
           '    return checkpoints, state.replace(opt_state=jax.jit('
           'optimizer.init)(state.params)), streams\n',
           'tests/test_resume.py::test_a_killed_run_goes_on_bit_for_bit'),
    Mutant('lines of lost steps kept', 'longt5_flax/training/metrics.py',
           "if line['step'] < first_step]", ']',
           'tests/test_resume.py::test_a_killed_run_goes_on_bit_for_bit'),
    Mutant('steps lost at Ctrl-C', 'train.py',
           'is_last = step == config.steps or stopping',
           'is_last = step == config.steps',
           'tests/test_resume.py::test_a_stopped_run_saves_and_goes_on'),
    Mutant('hosts feed the same rows', 'longt5_flax/training/partitioning.py',
           '    return array[[place[row] for row in wanted]]\n',
           '    return array[[place[row] * 0 for row in wanted]]\n',
           'tests/test_processes.py'
           '::test_two_processes_give_the_losses_of_one'),
]


def passes(folder: Path, tests: list[str]) -> bool:
  """Whether all of the tests pass in a copy."""
  result = subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '-x', '-n', '0', '-p',
       'no:cacheprovider', *tests], cwd=folder, capture_output=True, text=True)
  # 1 is a failed test; anything above, a test that was not found.
  if result.returncode > 1:
    raise SystemExit(result.stdout[-2000:] + result.stderr[-2000:])
  return result.returncode == 0


def main() -> None:
  chosen = [mutant for mutant in MUTANTS if all(
      word in mutant.name for word in sys.argv[1:])]
  missed = []
  with tempfile.TemporaryDirectory() as parent:
    copy = Path(parent) / 'copy'
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        '.*', 'runs', '__pycache__'))
    if not passes(copy, sorted({mutant.test for mutant in chosen})):
      raise SystemExit('The tests fail before any mutant.')
    for mutant in chosen:
      path = copy / mutant.file
      text = path.read_text()
      if text.count(mutant.old) != 1:
        raise SystemExit(f'{mutant.name}: found {text.count(mutant.old)} times '
                         f'in {mutant.file}, must be once.')
      path.write_text(text.replace(mutant.old, mutant.new))
      caught = not passes(copy, [mutant.test])
      path.write_text(text)
      missed += [] if caught else [mutant.name]
      print(f'{"caught" if caught else "MISSED"}  {mutant.name}  '
            f'({mutant.test})', flush=True)
  print(f'{len(chosen) - len(missed)} of {len(chosen)} caught')
  sys.exit(bool(missed))


if __name__ == '__main__':
  main()
