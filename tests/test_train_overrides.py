"""Overrides of every kind, in runs of three steps through train.main: each
test looks for the effect."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import runs
import tiny_runs
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.interop.orbax import open_run, save_orbax
from longt5_flax.training import run_config
from longt5_flax.training.train_step import batch_loss, named_key

# They change nothing but the rate and share a run with others.
CONSTANT, RSQRT = (
    dict(schedule__name=name, schedule__learning_rate=0.5,
         schedule__warmup_steps=2) for name in ('constant', 'rsqrt'))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Runs a tiny config with overrides, each combination once."""
  done = {}

  def run(devices=1, **overrides):
    overrides = {name.replace('__', '.'): value
                 for name, value in overrides.items()}
    key = json.dumps(overrides, sort_keys=True)
    if key not in done:
      done[key] = tiny_runs.run(
          tmp_path_factory.mktemp('run'), overrides, devices)
      check_recorded(done[key].config, tiny_runs.TINY | overrides)
    return done[key]

  with (tiny_runs.own_signals(),
        tiny_runs.cheap_compilation(tmp_path_factory.mktemp('compiled'))):
    yield run


def check_recorded(config, overrides):
  """Every value used is in config.json."""
  for name, value in overrides.items():
    recorded = config
    for part in name.split('.'):
      recorded = recorded[part]
    value = list(value) if isinstance(value, tuple) else value
    assert recorded == value, name


def test_baseline(run):
  """What the other tests see change."""
  base = run()
  assert base.column('step') == [1, 2, 3]
  assert base.checkpoints == [3]
  assert all(line['z_loss'] > 0 for line in base.lines())
  shapes = base.shapes('params')
  assert shapes['encoder/layers/mlp/wi_0/kernel'] == (1, 32, 64)
  assert 'encoder/side_relpos_bias/rel_embedding' in shapes
  assert [batch['encoder_input_tokens'].shape
          for batch in base.batches] == [(8, 64)] * 3
  assert max(batch['encoder_segment_ids'].max() for batch in base.batches) > 1
  assert base.config['run']['devices'] == '8 x cpu'


def sizes_run(run):
  return run(model__num_layers=2, model__num_decoder_layers=1, model__d_ff=96,
             model__encoder_attention_type='full', **RSQRT)


def test_model_sizes_change_parameters(run):
  shapes = sizes_run(run).shapes('params')
  assert shapes['encoder/layers/mlp/wi_0/kernel'] == (2, 32, 96)
  assert shapes['decoder/layers/mlp/wo/kernel'] == (1, 96, 32)
  # Full attention has no globals.
  assert 'encoder/relpos_bias/rel_embedding' in shapes
  assert 'encoder/side_relpos_bias/rel_embedding' not in shapes
  assert not [name for name in shapes if 'T5LayerNorm_0' in name]


def test_unrolled_layers_and_adamw_change_the_state(run):
  base = state_of(run(), 'encoder/layers/mlp/wi_0/kernel')
  assert base['v_row'] == (1, 32)
  assert base['v_col'] == (1, 64)
  other = run(precision__scan_layers=False, optimizer__name='adamw')
  shapes = other.shapes('params')
  assert shapes['encoder/layers_0/mlp/wi_0/kernel'] == (32, 64)
  assert not [name for name in shapes if '/layers/' in name]
  moments = state_of(other, 'encoder/layers_0/mlp/wi_0/kernel')
  assert moments == {'mu': (32, 64), 'nu': (32, 64)}


def state_of(run, parameter):
  """moment -> shape of what the optimizer keeps of a parameter."""
  return {name.removesuffix('/' + parameter).rpartition('/')[2]: shape
          for name, shape in run.shapes('opt_state').items()
          if name.endswith('/' + parameter)}


def test_gap_sentences_change_the_batch(run):
  """The first nine of ten sentences masked, and they alone can be seen."""
  other = run(data__long_documents='cut', gap_sentences__strategy='lead',
              gap_sentences__ratio=0.9, gap_sentences__mask_id=7,
              gap_sentences__probabilities=(1.0, 0.0, 0.0, 0.0))
  for batch in other.batches:
    assert np.all(batch['encoder_input_tokens'] == 7)
  # Pieces are short enough for their ends to be seen, and some share a row.
  base = run().batches
  assert not any(np.any(np.all(batch['encoder_input_tokens'] == 2, axis=1))
                 for batch in base)
  assert max(batch['encoder_segment_ids'].max() for batch in base) > 1


def test_text_files_by_a_glob_without_packing(run, tmp_path_factory):
  """Two short files, and a third that the glob leaves out."""
  folder = tmp_path_factory.mktemp('text')
  text = ' The owl hoots. The fox barks. The hare runs away.'
  for name in ('a.txt', 'b.txt', 'c.md'):
    (folder / name).write_text(name + text, 'utf-8')
  other = run(data__source='text', data__path=f'{folder}/*.txt',
              data__packing=False, data__workers=1)
  assert '2 documents' in other.printed
  for batch in other.batches:
    assert len(np.unique(batch['encoder_input_tokens'])) < 40
    # Two of them would fit one row.
    assert {*batch['encoder_segment_ids'].flat} == {0, 1}
    assert np.all((batch['encoder_segment_ids'] > 0).sum(axis=1) < 32)


@pytest.fixture(scope='module')
def plain_loss(run):
  return run(loss__z_loss=0.0, **CONSTANT)


def test_z_loss_is_left_out(plain_loss, run):
  """On the same rows, by the same parameters."""
  assert plain_loss.column('z_loss') == [0.0] * 3
  first, before = plain_loss.lines()[0], run().lines()[0]
  assert before['z_loss'] > 1e-3
  assert first['loss'] == pytest.approx(
      before['loss'] - before['z_loss'], abs=1e-5)


def test_schedules_change_the_learning_rate(plain_loss, run):
  np.testing.assert_allclose(  # Rises linearly over two steps.
      plain_loss.column('learning_rate'), [0.25, 0.5, 0.5], rtol=1e-6)
  np.testing.assert_allclose(  # Stands still over two steps.
      sizes_run(run).column('learning_rate'), [0.5 * 2**-0.5] * 3, rtol=1e-6)


def test_mesh_batch_and_precision(run, monkeypatch):
  """What the step is traced with, and where its parameters live."""
  traced = set()

  def recorded(model, loss, params, batch, *rest):
    traced.add((len(batch['encoder_input_tokens']), model.remat,
                jnp.dtype(model.dtype).name))
    return batch_loss(model, loss, params, batch, *rest)

  monkeypatch.setattr(
      'longt5_flax.training.train_step.batch_loss', recorded)
  other = run(devices=2, mesh__fsdp=2, data__batch_size=16,
              optimizer__microbatches=2, precision__dtype='bfloat16',
              precision__remat='offload')
  assert traced == {(8, 'offload', 'bfloat16')}
  assert "as with 'layer'" in other.printed
  assert [batch['encoder_input_tokens'].shape
          for batch in other.batches] == [(16, 64)] * 3
  assert other.column('decoder_tokens') == [
      batch['decoder_loss_weights'].sum() for batch in other.batches]
  sharding = other.shardings['encoder']['layers']['mlp']['wi_0']['kernel']
  assert sharding.spec == PartitionSpec(None, 'fsdp', 'tensor')
  assert dict(sharding.mesh.shape) == dict(data=1, fsdp=2, tensor=1, sequence=1)


def test_next_command_goes_on_with_the_same_overrides(run):
  command = next(line for line in sizes_run(run).printed.splitlines()
                 if '--config.model.d_ff=96' in line)
  assert command.endswith(' --config.steps=6')
  assert '--config.steps=3' not in command


@pytest.fixture(scope='module')
def loop(run):
  """One run for all that changes around the steps and not in them."""
  return run(
      steps=5, log_every_steps=2, checkpoint__every_steps=1,
      checkpoint__keep=2, checkpoint__keep_every_steps=2,
      eval__every_steps=2, eval__max_batches=1,
      data__validation_path=tiny_runs.TINY['data.path'],
      profile__first_step=4, profile__num_steps=9)


def test_log_every_steps(loop):
  assert loop.column('step') == [2, 4, 5]


def test_checkpoints_kept(loop):
  """The newest two, and those of even steps."""
  assert loop.checkpoints == [2, 4, 5]


def test_evaluation(loop, run):
  validation = loop.lines('validation')
  assert [line['step'] for line in validation] == [2, 4, 5]
  assert all(line['loss'] > 0 for line in validation)
  assert run().lines('validation') == []


def test_profile(loop, run):
  """Also where the run ends before the trace was to."""
  assert len(list(loop.workdir.rglob('*.xplane.pb'))) == 1
  assert not list(run().workdir.rglob('*.xplane.pb'))


def test_seed_changes_parameters_and_order(run):
  base, other = run(), run(seed=1)
  assert other.column('loss')[0] != base.column('loss')[0]
  assert other.column('param_norm')[0] != base.column('param_norm')[0]
  assert not np.array_equal(other.batches[0]['encoder_input_tokens'],
                            base.batches[0]['encoder_input_tokens'])


def test_init_from_takes_parameters_only(run):
  base = run()
  other = run(init_from=f'run:{base.workdir}')
  assert other.column('step') == [1, 2, 3]
  assert other.column('learning_rate') == base.column('learning_rate')
  assert np.array_equal(other.batches[0]['encoder_input_tokens'],
                        base.batches[0]['encoder_input_tokens'])
  # It has learned from these rows already.
  assert other.column('loss')[0] < base.column('loss')[0]


def test_init_from_another_kind_is_the_same_start(run, tmp_path_factory):
  base = run()
  folder = tmp_path_factory.mktemp('orbax') / 'parameters'
  tensors = open_run(str(base.workdir))
  save_orbax(str(folder), tensors, tensors.config)
  other = run(init_from=f'orbax:{folder}')
  assert other.column('loss') == run(
      init_from=f'run:{base.workdir}').column('loss')
  assert f'init_from: {folder}/params: an Orbax checkpoint.' in other.printed


# A document whose best sentence depends on how it is looked for.
SENTENCES = ('Lemons glow.', 'Dogs sang.',
             'The cat saw a big dog run to the old old house.', 'The dog.',
             'The dog and the cat went to the house.')
MASK, FIRST_SENTINEL = 2, 4089  # With 90 extra ids beyond 4000 pieces.
OPTIMIZERS = {
    'adafactor': {},
    'unscaled': dict(optimizer__multiply_by_parameter_scale=False),
    'adamw': dict(optimizer__name='adamw', optimizer__weight_decay=0.5,
                  optimizer__clip_global_norm=1e-3),
}
# name: optimizer, overrides of gap_sentences, which sentences are selected
STRATEGIES = {
    'dynamic_rouge': ('unscaled', {}, [4]),
    'lead': ('adamw', dict(strategy='lead'), [0]),
    'random': ('adafactor', dict(strategy='random'), None),
    'precision': ('adamw', dict(strategy='rouge', metric='precision'), [3]),
    'recall': ('unscaled', dict(strategy='rouge', metric='recall'), [2]),
    'two': ('adafactor', dict(strategy='rouge', ratio=0.4), [2, 4]),
    'greedy': ('adamw', dict(strategy='greedy_rouge', ratio=0.4), [1, 4]),
    'continuous': ('unscaled', dict(strategy='continuous_rouge', ratio=0.4),
                   [2, 3]),
    'removed': ('adafactor', dict(probabilities=(0.0, 0.0, 0.0, 1.0)), [4]),
}
# name: optimizer, overrides
OBJECTIVES = {
    'spans': ('adafactor', dict(data__objective='span_corruption')),
    'dense spans': ('adamw', dict(
        data__objective='span_corruption', span_corruption__noise_density=0.5,
        span_corruption__mean_noise_span_length=1.0)),
    'mix': ('unscaled', dict(
        data__objective='gap_sentences:1,span_corruption:1',
        gap_sentences__strategy='lead')),
}
# Traced and compiled fastest.
SMALL = dict(steps=1, data__targets_length=48,
             model__encoder_attention_type='full')


@pytest.fixture(scope='module')
def combination(run, tmp_path_factory):
  """One step by an optimizer, on rows of one document each."""
  path = tmp_path_factory.mktemp('combination') / 'a.jsonl'
  path.write_text(json.dumps({'text': ' '.join(SENTENCES)}) + '\n')

  def combination(optimizer, **overrides):
    overrides = dict(gap_sentences__probabilities=(1.0, 0.0, 0.0, 0.0)
                     ) | overrides
    other = run(data__path=str(path), data__packing=False, data__extra_ids=90,
                **SMALL, **OPTIMIZERS[optimizer], **overrides)
    check_update(other, optimizer)
    return other

  return combination


@functools.cache
def first_kernel():
  model = run_config.make_model(tiny_runs.tiny({
      name.replace('__', '.'): value for name, value in SMALL.items()}))
  token = jnp.ones((1, 1), jnp.int32)
  return np.asarray(jax.jit(lambda: model.init(
      named_key(0, 'params'), token, token)['params']['encoder']['layers'][
          'mlp']['wi_0']['kernel'])())


def check_update(run, optimizer):
  """One step moved a kernel as its optimizer does."""
  arrays, _ = runs.checkpoint(run.workdir, 1)
  name = '/encoder/layers/mlp/wi_0/kernel'
  rate, before = run.column('learning_rate')[0], first_kernel()
  step = (arrays['/params' + name] - before) / rate
  if optimizer == 'adafactor':  # In units of the parameter's size.
    assert 0.5 < np.std(step) / np.std(before) < 1.05
  elif optimizer == 'unscaled':
    assert 0.5 < np.std(step) < 1.05
  else:  # By the rate, and towards zero by half of itself; clipped to 0.001.
    assert np.median(np.abs(step + 0.5 * before)) == pytest.approx(1, rel=0.02)
    norm = np.sqrt(sum(np.sum(np.square(array)) for path, array
                       in arrays.items() if '/mu/' in path))
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)


def ids_of(sentences):
  vocabulary = Vocabulary(tiny_runs.TINY['data.vocabulary'], 90)
  return [vocabulary.encode(sentence) for sentence in sentences]


def without_padding(rows):
  return [row[row > 0].tolist() for row in rows]


@pytest.mark.parametrize('name', STRATEGIES)
def test_strategies_and_optimizers(name, combination):
  """Inputs and targets of every row, token for token."""
  optimizer, overrides, selected = STRATEGIES[name]
  batch = combination(optimizer, **{
      f'gap_sentences__{key}': value for key, value in overrides.items()
  }).batches[0]
  ids = ids_of(SENTENCES)
  seen = set()
  for inputs, targets in zip(
      without_padding(batch['encoder_input_tokens']),
      without_padding(batch['decoder_target_tokens']), strict=True):
    row, = [selected] if selected else [
        [i] for i in range(5) if targets == [*ids[i], 1]]
    seen.update(row)
    assert targets == [*itertools.chain(*(ids[i] for i in row)), 1]
    mask = [] if name == 'removed' else [MASK]
    assert inputs == [*itertools.chain(*(
        mask if i in row else ids[i] for i in range(5))), 1]
  assert selected or len(seen) > 1


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objectives_and_optimizers(name, combination):
  optimizer, overrides = OBJECTIVES[name]
  batch = combination(optimizer, **overrides).batches[0]
  document = [*itertools.chain(*ids_of(SENTENCES)), 1]
  spans = 0
  for inputs, targets in zip(
      without_padding(batch['encoder_input_tokens']),
      without_padding(batch['decoder_target_tokens']), strict=True):
    if targets[0] != FIRST_SENTINEL:
      assert targets == [*ids_of(SENTENCES)[0], 1]
      continue
    spans += 1
    hidden = sum(i < 4000 for i in targets) - 1
    density = 0.5 if name == 'dense spans' else 0.15
    assert hidden == round(density * (len(document) - 1))
    # What is hidden, put back, gives the document.
    parts = dict(parts_by_sentinel(targets))
    assert [*itertools.chain(*(parts.get(i, [i]) for i in inputs))] == document
    if name == 'dense spans':
      assert {len(part) for part in parts.values()} == {1}
  assert (0 < spans < 8) if name == 'mix' else spans == 8


def parts_by_sentinel(targets):
  """(sentinel, the tokens after it) of targets, EOS left out."""
  starts = [i for i, token in enumerate(targets) if token >= 4000]
  for start, end in zip(starts, [*starts[1:], len(targets) - 1], strict=True):
    yield targets[start], targets[start + 1:end]
