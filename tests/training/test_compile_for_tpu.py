"""The train step is compiled for TPUs that are not here, by libtpu, kernels and
all."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jax.experimental import topologies

import runs
import tiny_runs
from longt5_flax.training import partitioning, run_config
from longt5_flax.training.optimizer import make_optimizer
from longt5_flax.training.schedules import make_schedule
from longt5_flax.training.train_step import init_state, make_train_step

# Parts of a batch with the length of inputs and of targets.
BATCH = {
    'encoder': ('input_tokens', 'segment_ids', 'positions'),
    'decoder': ('input_tokens', 'segment_ids', 'positions', 'target_tokens',
                'loss_weights'),
}


@pytest.fixture
def topology(monkeypatch):
  pytest.importorskip('libtpu')
  # Another process may have libtpu open; none has a TPU.
  monkeypatch.setenv('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  # Devices of a topology are not of the class that is annotated.
  jaxtyping.config.update('jaxtyping_disable', True)
  yield lambda name: topologies.get_topology_desc(
      platform='tpu', topology_name=name)
  jaxtyping.config.update('jaxtyping_disable', False)


def abstract_batch(config, sharding):
  lengths = {'encoder': config.data.inputs_length,
             'decoder': config.data.targets_length}
  return {f'{side}_{name}': jax.ShapeDtypeStruct(
      (config.data.batch_size, lengths[side]), jnp.int32, sharding=sharding)
          for side, names in BATCH.items() for name in names}


def test_train_step(topology):
  """On a 2 x 2 mesh of rows and heads, attention chosen by `auto`: the program
  has every kernel, and nothing as large as scores."""
  config, _ = tiny_runs.parse(
      f'--config={runs.ROOT}/configs/tglobal_base.py',
      '--config.model.preset=tglobal-small', '--config.data.batch_size=2',
      '--config.data.inputs_length=2048', '--config.data.targets_length=128')
  mesh = partitioning.make_mesh(
      {'data': 2, 'fsdp': 1, 'tensor': 2, 'sequence': 1},
      topology('v5e:2x2').devices)
  choice = run_config.attention_choice(config, mesh.devices.flat[0].platform)
  assert choice.encoder == 'fused'
  model = run_config.make_model(config)
  schedule = make_schedule(**config.schedule, steps=config.steps)
  optimizer = make_optimizer(config.optimizer, schedule)
  step = make_train_step(model, optimizer, schedule, config)
  with partitioning.active(mesh):
    state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
    shardings = partitioning.state_shardings(state, state.params, mesh)
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding), state, shardings)
    lowered = jax.jit(
        step, donate_argnums=0, out_shardings=(shardings, None)).lower(
            state, abstract_batch(config, partitioning.batch_sharding(mesh)))
  # Whether it compiles is asked, not how fast it is then.
  compiled = lowered.compile(
      compiler_options={'exec_time_optimization_effort': -1.0})
  program = compiled.as_text()
  for kernel in ('attention_forward', 'attention_backward_query',
                 'attention_backward_key', 'attention_backward_side',
                 'segment_attention_forward',
                 'segment_attention_backward_query',
                 'segment_attention_backward_side'):
    assert f'longt5_{kernel}' in program
