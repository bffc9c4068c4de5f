r"""Evaluates a LongT5: decodes the examples of a task and scores them.

  python eval.py --workdir=runs/finetune
  python eval.py --workdir=runs/finetune --config.eval.num_beams=4
  python eval.py --checkpoint=run:runs/finetune --workdir=runs/finetune-test \
    --config.data.validation_path=test.jsonl
  python eval.py --checkpoint=hf:DIR --config=configs/base.py \
    --config.data.validation_path=test.jsonl --config.data.vocabulary=m.model \
    --config.eval.metric=rouge --workdir=runs/theirs

Examples are read from data.validation_path. The checkpoint of a run brings its
config along; what is overridden is for this evaluation only. WORKDIR/eval/STEP
gets predictions.jsonl and scores.json. The same command again goes on where it
was stopped. docs/finetuning.md says more.
"""

import argparse
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from configs import base
from longt5_flax.command_line import override, read_config, recorded_config
from longt5_flax.config import ConfigError, read_json_object
from longt5_flax.data.sources import DataError
from longt5_flax.eval_task import load_task, load_vocabulary
from longt5_flax.evaluator import Evaluator, eval_metric
from longt5_flax.interop.layers import init_params
from longt5_flax.interop.open import open_tensors, split_spec
from longt5_flax.interop.orbax import run_checkpoint
from longt5_flax.interop.tensors import load_params
from longt5_flax.training import distributed, partitioning, run_config
from longt5_flax.training.checkpoints import abstract_state
from longt5_flax.training.progress import Report


class Checkpoint(NamedTuple):
  """What is evaluated.

  Attributes:
    spec: KIND:PATH, of a run that of the checkpoint chosen.
    workdir: gets the results.
    step: that the checkpoint is of; 0 where it does not say.
    record: the config of the run; {} where there was none.
    note: which checkpoint of a run it is; '' of no run.
  """
  spec: str
  workdir: str
  step: int
  record: dict[str, Any]
  note: str


def main(options: argparse.Namespace, overrides: Sequence[str]) -> None:
  """Evaluates one checkpoint.

  Raises:
    ConfigError, DataError: a mistake of the user, in one line.
  """
  # --- Checkpoint, config -----------------------------------------------------
  checkpoint = find_checkpoint(options.checkpoint, options.workdir)
  config = make_config(options.config, checkpoint, overrides)
  run_config.check_config(config)
  eval_metric(config.eval)  # Of pretraining there is none: say so first.
  holds_config = not checkpoint.spec.startswith(('t5x:', 't5:'))
  tensors = open_tensors(checkpoint.spec, None if holds_config else (
      run_config.model_config(config.model)))

  # --- Mesh, model, data ------------------------------------------------------
  mesh = partitioning.make_mesh(dict(config.mesh), jax.devices())
  model = run_config.make_model(config, tensors.config)
  vocabulary = load_vocabulary(config, model.config, checkpoint.record)
  task = load_task(config, vocabulary)
  evaluator = Evaluator(config, model, vocabulary, mesh, task)

  # --- Weights ----------------------------------------------------------------
  wanted = jax.eval_shape(lambda: init_params(
      model, jax.random.key(0), inputs=2))
  params = load_params(tensors, abstract_state(
      wanted, partitioning.state_shardings(wanted, wanted, mesh)))

  # --- Decode, score ----------------------------------------------------------
  folder = os.path.join(checkpoint.workdir, 'eval', str(checkpoint.step))
  with Report(distributed.is_main()) as report:
    for line in [checkpoint.note] if checkpoint.note else tensors.report:
      report.say(line)
    report.say(f'{len(task.examples):,} examples of {task.path}, {task.cut:,} '
               f'inputs cut; {jax.device_count()} x '
               f'{jax.devices()[0].device_kind}')
    scores = evaluator(params, folder, checkpoint.spec, report)
    for name, it in scores.items():
      report.say(f'{name} {it.mean:.2f} ({it.low:.2f} to {it.high:.2f})')
    report.say(f'Written: {folder}/predictions.jsonl and scores.json')


def find_checkpoint(spec: str | None, workdir: str | None) -> Checkpoint:
  """What the command line names.

  Raises:
    ConfigError: nothing, or what is not there.
  """
  if not (spec or workdir):
    raise ConfigError('--workdir=DIR is missing: the folder of a run, or with '
                      '--checkpoint=KIND:PATH a folder for the results.')
  kind, path = split_spec(spec or f'run:{workdir}')
  if kind != 'run':
    if not workdir:
      raise ConfigError('--workdir=DIR is missing: a folder for the results.')
    step = re.search(r'checkpoint_(\d+)/*$', path)  # As T5X calls it.
    return Checkpoint(f'{kind}:{path}', workdir,
                      int(step.group(1)) if step else 0, {}, '')
  directory, note = run_checkpoint(path)
  run, step_name = os.path.split(directory)
  return Checkpoint(
      f'run:{directory}', workdir or os.path.dirname(run), int(step_name),
      read_json_object(os.path.join(directory, 'config', 'metadata')), note)


def make_config(path: str | None, checkpoint: Checkpoint,
                overrides: Sequence[str]) -> Any:
  """The config of a file, or else that of the run, with overrides.

  eval.max_examples, which bounds evaluation in training, counts only where it
  is among the overrides.

  Raises:
    ConfigError: there is none, or an override is wrong.
  """
  overrides = ['--config.eval.max_examples=0', *overrides]
  if path:
    return read_config(path, overrides)
  if not checkpoint.record:
    raise ConfigError(f'--config=FILE is missing: {checkpoint.spec} is of no '
                      'run that would bring its own.')
  return override(recorded_config(base.get_config(), checkpoint.record),
                  overrides)


def make_parser() -> argparse.ArgumentParser:
  """The options that no config has."""
  parser = argparse.ArgumentParser(
      prog='python eval.py', allow_abbrev=False,
      description='Decodes the examples of a task and scores them.',
      epilog='--config.KEY=VALUE is an override, as of train.py.')
  parser.add_argument('--workdir', metavar='DIR', help='gets eval/STEP/; by '
                      'default the folder of the run')
  parser.add_argument('--checkpoint', metavar='KIND:PATH', help='run:WORKDIR, '
                      'its best or newest checkpoint; run:WORKDIR/checkpoints/'
                      'STEP; orbax:, hf:, t5x: or safetensors: and a path; by '
                      'default run:WORKDIR of --workdir')
  parser.add_argument('--config', metavar='FILE', help='by default the one of '
                      'the run')
  parser.add_argument('--coordinator', default='', metavar='HOST:PORT',
                      help='of process 0, for several processes')
  parser.add_argument('--num_processes', type=int, default=-1, metavar='N')
  parser.add_argument('--process_id', type=int, default=-1, metavar='N')
  return parser


def run(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  options, overrides = make_parser().parse_known_args(argv)
  try:
    for word in overrides:
      if word.startswith('--') and not word.startswith('--config.'):
        raise ConfigError(f'unknown argument {word!r}.')
    distributed.initialize(
        options.coordinator, options.num_processes, options.process_id)
    main(options, overrides)
  except (ConfigError, DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    return distributed.leave(2)
  except KeyboardInterrupt:
    print('Stopped; the same command goes on.', file=sys.stderr)
    return distributed.leave(128 + signal.SIGINT)
  except Exception as error:
    return distributed.leave_after(error)
  return 0


if __name__ == '__main__':
  sys.exit(run())
