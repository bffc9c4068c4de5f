r"""Trains LongT5: pretrains it, or fine-tunes it on a task.

  python train.py --config=configs/quickstart.py
  python train.py --config=configs/tglobal_large.py \
    --config.data.source=jsonl --config.data.path=books.jsonl.xz \
    --config.data.vocabulary=m.model
  python train.py --config=configs/finetune.py:arxiv --config.init_from=hf:DIR

Every key of configs/base.py can be overridden. The same command again goes on
where the run was stopped. docs/reproducibility.md says what is exact,
docs/finetuning.md how to fine-tune.
"""

import contextlib
import os
import shlex
import signal
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import config_flags
from rich.panel import Panel
from rich.text import Text

import longt5_flax
from longt5_flax.command_line import MISTAKES, one_line
from longt5_flax.config import ConfigError
from longt5_flax.data.sources import DataError
from longt5_flax.evaluator import make_evaluator
from longt5_flax.inputs import make_inputs
from longt5_flax.interop.orbax import checkpoint_steps
from longt5_flax.samples import write_samples
from longt5_flax.training import distributed, partitioning, run_config
from longt5_flax.training.best import BestCheckpoint
from longt5_flax.training.checkpoints import (
    Checkpoints,
    abstract_state,
    check_same_run,
)
from longt5_flax.training.init_from import initial_params
from longt5_flax.training.metrics import MetricsWriter, plot_loss
from longt5_flax.training.optimizer import make_optimizer, num_parameters
from longt5_flax.training.progress import Meter, ProgressReport
from longt5_flax.training.schedules import make_schedule
from longt5_flax.training.train_step import (
    TrainState,
    batch_loss,
    init_state,
    jit_train_step,
    make_train_step,
    mean_metrics,
)

_CONFIG = config_flags.DEFINE_config_file('config', lock_config=True)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'The run\'s folder; by default runs/<config name>, with '
    'the config\'s argument behind it.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', '', 'HOST:PORT of process 0, for several processes where '
    'the environment does not say it (TPU pods and Slurm do).')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', -1, 'Of the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', -1, 'Of this process.')


def main(config, workdir):
  """Runs what is left of a run, and returns the signal that ended it, or 0."""
  # --- Mesh -------------------------------------------------------------------
  run_config.check_config(config)
  run_config.check_paths(config)
  mesh = partitioning.make_mesh(dict(config.mesh), jax.devices())
  run_config.check_batch(config, partitioning.rows_divisor(mesh))
  platform = mesh.devices.flat[0].platform
  attention = run_config.attention_choice(config, platform)
  batch_size = config.data.batch_size
  rows = partitioning.local_rows(mesh, batch_size)

  # --- Data -------------------------------------------------------------------
  model = run_config.make_model(config)
  vocabulary, batches, held_out, corpus = make_inputs(
      config, model.config, rows, partitioning.row_shard(mesh, batch_size))
  evaluator = make_evaluator(config, model, vocabulary, mesh)

  # --- Model, optimizer, state ------------------------------------------------
  schedule = make_schedule(**config.schedule, steps=config.steps)
  optimizer = make_optimizer(config.optimizer, schedule)

  def new_state():
    return init_state(model, optimizer, config.seed)

  abstract = jax.eval_shape(new_state)
  shardings = partitioning.state_shardings(abstract, abstract.params, mesh)
  abstract = abstract_state(abstract, shardings)

  # --- Restore ----------------------------------------------------------------
  values = run_config.resolved(config) | {'vocabulary': vocabulary.fingerprint}
  best = BestCheckpoint(workdir, config.eval.keep_best,
                        max(checkpoint_steps(workdir), default=0))
  checkpoints, state, streams, notes = restore(
      config, values, workdir, abstract, new_state, optimizer, best)
  if streams is not None:
    batches.set_state(streams)
  first_step = int(state.step)
  is_main = distributed.is_main()
  if is_main:
    run_config.write_config(workdir, values, longt5_flax.__version__)
  writer = MetricsWriter(workdir, first_step + 1) if is_main else None
  report = ProgressReport(config.steps, first_step, is_main)
  report.say(
      f'{config.model.preset}: {num_parameters(abstract.params):,} parameters, '
      f'{corpus}, {jax.device_count()} x '
      f'{jax.devices()[0].device_kind}; {workdir}, from step {first_step}')
  report.say(str(attention))
  if offload_note := run_config.offload_note(config, platform):
    report.say(offload_note)
  for note in notes:
    report.say(f'init_from: {note}')

  # --- Loop -------------------------------------------------------------------
  train_step = jit_train_step(
      make_train_step(model, optimizer, schedule, config), shardings, platform)
  eval_step = jax.jit(
      lambda params, batch: batch_loss(model, config.loss, params, batch))
  meter = Meter(model.config, config.data, jax.devices()[0].device_kind,
                jax.device_count())
  stop = StopRequest()

  def is_decode(step):
    every = config.eval.decode_every_steps
    return evaluator and (step % every == 0 or step == config.steps)

  def finish(step, metrics):
    """Writes the metrics of a step, once the next one is on its way."""
    metrics = jax.device_get(metrics)
    if not np.isfinite(metrics['loss']):
      raise ConfigError(f'loss={metrics["loss"]} at step {step}: the last '
                        f'checkpoint is of step {checkpoints.latest_step}.')
    meter.add(metrics)
    report.advance(step)
    if step % config.log_every_steps == 0 or step == config.steps:
      rates = meter.read()
      report.line(step, metrics, rates)
      if writer:
        writer.write(step, 'train', metrics | rates)

  with (partitioning.active(mesh), batches,
        contextlib.closing(checkpoints)):  # Whatever ends it: they get whole.
    pending = None
    if first_step and is_decode(first_step) and first_step not in best:
      decode(evaluator, state.params, workdir, first_step, report, writer, best)
    for step in range(first_step + 1, config.steps + 1):
      if best.is_over(config.eval.patience):
        report.say(f'Ends at step {step - 1}: the best {config.eval.keep_best} '
                   f'is of step {best.step}.')
        break
      profile(config.profile, step - first_step, workdir)
      batch = partitioning.global_batch(
          mesh, rows, meter.take(batches, pending and pending[1]), batch_size)
      state, metrics = train_step(state, batch)
      if pending:
        finish(*pending)
      pending = step, metrics
      stopping = stop.requested(step)
      is_last = step == config.steps or stopping
      is_eval = held_out and (step % config.eval.every_steps == 0
                              or step == config.steps)
      is_save = (is_last or is_decode(step)  # Which may take long, or be best.
                 or step % config.checkpoint.every_steps == 0)
      if is_eval or is_save:
        finish(*pending)
        pending = None
        start = time.perf_counter()
        if is_eval:
          evaluate(eval_step, state.params, held_out, mesh, report, writer,
                   step)
        if is_save:
          states = distributed.gather_states(batches.get_state())
          checkpoints.save(step, state, states, values)
        if is_decode(step) and not stopping:  # Else the next start does it.
          decode(evaluator, state.params, workdir, step, report, writer, best)
        meter.leave_out(time.perf_counter() - start)
      if stopping:
        break
    report_data(batches.stats(), report)

  # --- End --------------------------------------------------------------------
  end_profile(config.profile, int(state.step) - first_step)
  report.close()
  if stop.signal:
    report.say(f'Stopped at step {int(state.step)}; the same command goes on.')
    return stop.signal
  if held_out and config.eval.samples:
    show_samples(model, state.params, held_out[0], vocabulary, config, mesh,
                 report, writer)
  if writer:
    writer.close()
    report.say(f'Loss curve: {plot_loss(workdir)}')
    say_what_next(report, workdir, config)
  return 0


def restore(config, values, workdir, abstract, new_state, optimizer, best):
  """Where the run begins: its checkpoints, state, stream states (or None), and
  lines that say what was read.

  1. The newest checkpoint of the work folder, if it has one: all of it.
  2. Else `init_from`: its parameters; step and optimizer are new.
  3. Else everything is new.
  """
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  latest = max(checkpoint_steps(workdir), default=None)
  if latest is None and config.init_from:
    params, notes = initial_params(
        config.init_from, run_config.model_config(config.model),
        abstract.params, values['vocabulary'])
  # Makes the folder, so only after all that can be refused.
  checkpoints = Checkpoints(
      os.path.join(workdir, 'checkpoints'), config.checkpoint,
      lambda: best.step)
  if latest is not None:
    check_same_run(checkpoints.config(latest), values, workdir)
    return checkpoints, *checkpoints.restore(latest, abstract), ()
  if config.init_from:
    opt_state = jax.jit(
        optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(np.zeros((), np.int32), shardings.step)
    return checkpoints, TrainState(step, params, opt_state), None, notes
  return checkpoints, jax.jit(new_state, out_shardings=shardings)(), None, ()


def evaluate(eval_step, params, held_out, mesh, report, writer, step):
  """The loss per target token over all held-out rows."""
  totals: Any = None
  batch_size = len(held_out[0]['encoder_input_tokens'])
  rows = partitioning.local_rows(mesh, batch_size)
  for batch in held_out:
    local = {name: array[rows] for name, array in batch.items()}
    sums = eval_step(
        params, partitioning.global_batch(mesh, rows, local, batch_size))
    totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
  metrics = jax.device_get(mean_metrics(totals))
  report.say(f'step {step}  held-out loss {metrics["loss"]:.4f}  '
             f'accuracy {metrics["accuracy"]:.3f}')
  if writer:
    writer.write(step, 'validation', metrics)


def decode(evaluator, params, workdir, step, report, writer, best):
  """Writes predictions for the validation examples, and scores them."""
  scores = evaluator(
      params, os.path.join(workdir, 'eval', str(step)),
      f'run:{workdir}/checkpoints/{step}', report, replace=True)
  means = {name: score.mean for name, score in scores.items()}
  report.say(f'step {step}  ' + '  '.join(
      f'{name} {mean:.2f}' for name, mean in means.items()))
  if writer:
    writer.write(step, 'scores', means)
  best.add(step, means[best.name or evaluator.main],
           write=distributed.is_main())


def profile(settings, step, workdir):
  """Starts and stops the profiler trace that config.profile asks for."""
  if settings.num_steps and step == settings.first_step:
    jax.profiler.start_trace(os.path.join(workdir, 'tensorboard'))
  elif settings.num_steps and step == settings.first_step + settings.num_steps:
    jax.profiler.stop_trace()


def end_profile(settings, steps):
  """Stops the trace that is still running when a run ends after `steps`."""
  first = settings.first_step
  if first <= steps < first + settings.num_steps:
    jax.profiler.stop_trace()


class StopRequest:
  """Ends the loop after the step in hand on Ctrl-C or SIGTERM.

  The signals reach every process of a run on their own; processes agree on the
  step through jax's preemption service, which takes over SIGTERM.
  """

  def __init__(self):
    self.signal = 0
    signals = [signal.SIGINT]
    if jax.process_count() == 1:
      signals.append(signal.SIGTERM)
    for number in signals:
      signal.signal(number, self._request)

  def _request(self, number, frame):
    del frame
    if self.signal:
      raise KeyboardInterrupt
    self.signal = number

  def requested(self, step):
    """Whether to stop after `step`; the same answer on every process."""
    if jax.process_count() > 1:
      if multihost_utils.reached_preemption_sync_point(step):
        self.signal = self.signal or signal.SIGTERM
        return True
      return False
    return bool(self.signal)


def report_data(stats, report):
  """Says what packing and cutting cost."""
  report.say('Padding: ' + ', '.join(
      f'{name} {value:.1%}' if isinstance(value, float) else f'{name} {value:,}'
      for name, value in stats.items()))


def show_samples(model, params, batch, vocabulary, config, mesh, report,
                 writer):
  """Shows masked sentences of held-out text and what the model wrote."""
  samples = write_samples(
      model, params, batch, vocabulary, config.gap_sentences.mask_id,
      config.eval, mesh)
  for sample in samples:
    text = (f'{sample.context}\n\nMasked:  {sample.target}\n\n'
            f'Written: {sample.written}')
    report.console.print(
        Panel(Text(text), title='Held-out document'), soft_wrap=False)
    if writer:
      writer.write_text(config.steps, 'sample', text)


def say_what_next(report, workdir, config):
  """The commands that a person may want next."""
  python = os.path.relpath(sys.executable)
  python = sys.executable if python.startswith('..') else python
  same = shlex.join(arg for arg in sys.argv[1:]
                    if not arg.startswith('--config.steps='))
  report.say(
      f'Next:\n'
      f'  tensorboard --logdir={workdir}\n'
      f'  {python} train.py {same} --config.steps={2 * config.steps}\n' + (
          f'  {python} eval.py --workdir={workdir}' if config.eval.metric else
          f'  {python} train.py --config=configs/tglobal_base.py '
          '--config.data.source=jsonl --config.data.path=YOUR.jsonl.xz '
          '--config.data.vocabulary=YOUR.model'))


def run(argv):
  """Starts `main`; a user's mistake becomes one line and exit code 2."""
  del argv
  path, _, argument = config_flags.get_config_filename(
      flags.FLAGS['config']).partition(':')
  name = os.path.splitext(os.path.basename(path))[0]
  name += f'_{argument}' if argument else ''
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # Orbax says a lot.
  try:
    distributed.initialize(
        _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    ended_by = main(_CONFIG.value, _WORKDIR.value or f'runs/{name}')
  except (ConfigError, DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    return distributed.leave(2)
  except (Exception, KeyboardInterrupt) as error:
    return distributed.leave_after(error)
  return 128 + ended_by if ended_by else 0


def parse_flags(argv):
  """Reads the command line; a mistake becomes one line and exit code 2."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise flags.Error(f'unexpected argument {rest[1]!r}')
    if _CONFIG.value is None:
      raise flags.Error('--config=FILE is missing')
    _CONFIG.value.lock()  # Raises what went wrong when the file was read.
    return rest
  except MISTAKES as error:
    print(f'error: {one_line(error)}', file=sys.stderr)
    sys.exit(2)


if __name__ == '__main__':
  app.run(run, flags_parser=parse_flags)
