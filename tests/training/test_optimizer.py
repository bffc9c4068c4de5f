"""Adafactor is T5X's, three steps of it; stacked layers are matrices apart."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import golden
from longt5_flax import ConfigError
from longt5_flax.interop.layers import stack_layers, unstack_layers
from longt5_flax.training.optimizer import make_optimizer
from longt5_flax.training.schedules import make_schedule

DATA = golden.read('adafactor')
LEAVES = sorted({name.removeprefix('params0/') for name in DATA
                 if name.startswith('params0/')})
SCHEDULES = {
    'rsqrt': make_schedule('rsqrt', 1.0, 10000, 1_000_000),
    'constant': make_schedule('constant', 1e-3, 0, 1_000_000),
}
# Of what a float32 of the leaf's largest size can resolve, 2^-24; right
# implementations stay below 2, wrong settings begin at 22.
UNITS = 8


def settings(name, **fields):
  return types.SimpleNamespace(**dict(
      name=name, clip_global_norm=0.0, decay_rate=0.8, clipping_threshold=1.0,
      min_dim_size_to_factor=128, multiply_by_parameter_scale=True,
      b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1) | fields)


def tree(prefix):
  return golden.tree_from_paths(
      {name: jnp.asarray(DATA[f'{prefix}/{name}']) for name in LEAVES})


def sampled(actual, expected):
  """The entries that the file has: all, or every n-th of a large leaf."""
  actual = np.asarray(actual)
  if actual.shape == expected.shape:
    return actual
  return actual.ravel()[::23 if actual.size > 20000 else 11]


def assert_parameters(params, expected_prefix, leaves=LEAVES):
  params = golden.flatten(params)
  for name in leaves:
    expected = DATA[f'{expected_prefix}/{name}']
    actual = sampled(params[name], expected)
    assert actual.shape == expected.shape
    units = np.abs(actual - expected).max() / np.abs(expected).max() * 2 ** 24
    assert units <= UNITS, f'{expected_prefix} {name}: {units:.1f} units'


@functools.cache
def three_steps(schedule, stacked):
  """Parameters after every step, unstacked, and the last state."""
  optimizer = make_optimizer(settings('adafactor'), SCHEDULES[schedule])
  layout = stack_layers if stacked else lambda tree: tree
  params = layout(tree('params0'))
  state = optimizer.init(params)
  history = []
  for step in (1, 2, 3):
    params, state = apply(optimizer)(params, layout(tree(f'grad{step}')), state)
    history.append(unstack_layers(params))
  return history, params, state, optimizer


@functools.cache
def apply(optimizer):
  @golden.jit
  def step(params, gradients, state):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state
  return step


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_three_steps(schedule, stacked):
  history, *_ = three_steps(schedule, stacked)
  for step, params in enumerate(history, start=1):
    assert_parameters(params, f'{schedule}/params{step}')


def test_a_zero_gradient_moves_nothing():
  history, *_ = three_steps('rsqrt', True)
  first, second = (
      golden.flatten(params)['encoder/layers_1/mlp/wi/kernel']
      for params in history[:2])
  assert not DATA['grad2/encoder/layers_1/mlp/wi/kernel'].any()
  np.testing.assert_array_equal(first, second)


def moments(state, field):
  """The second moments called `field`, by parameter."""
  factored = [
      node for node in jax.tree.leaves(
          state, is_leaf=lambda x: isinstance(x, optax.FactoredState))
      if isinstance(node, optax.FactoredState)]
  found = {}
  for node in factored:
    tree = jax.tree.map(
        lambda x: None if isinstance(x, optax.MaskedNode) else x,
        getattr(node, field),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    found |= {path: leaf for path, leaf in golden.flatten(tree).items()
              if leaf is not None}
  return golden.flatten(unstack_layers(golden.tree_from_paths(found)))


@pytest.mark.parametrize('stacked', [False, True])
def test_second_moments(stacked):
  """The same numbers in the same factors, whatever they are called."""
  _, _, state, _ = three_steps('rsqrt', stacked)
  fields = {field: moments(state, field) for field in ('v_row', 'v_col', 'v')}
  compared = 0
  for name, expected in DATA.items():
    if name.startswith('state3/'):
      leaf = name.removeprefix('state3/').rpartition('/')[0]
      full = DATA[f'params0/{leaf}']
      sizes = {'v_row': min(full.shape), 'v_col': max(full.shape),
               'v': full.size}
      wanted = sizes[name.rpartition('/')[2]]
      actual, = (value[leaf] for value in fields.values()
                 if value[leaf].size == wanted)
      np.testing.assert_allclose(
          sampled(actual, expected), expected, rtol=2e-6, err_msg=name)
      compared += 1
  factored = sum(name.endswith('v_row') for name in DATA)
  assert compared == len(LEAVES) + factored > len(LEAVES)


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_resumed_at_step_10001(schedule, stacked):
  """The learning rate and the decay both go by the step."""
  _, params, state, optimizer = three_steps(schedule, stacked)
  state = jax.tree_util.tree_map_with_path(
      lambda path, leaf: jnp.full_like(leaf, 10001)
      if getattr(path[-1], 'name', '') == 'count' else leaf, state)
  layout = stack_layers if stacked else lambda tree: tree
  params, _ = apply(optimizer)(params, layout(tree('grad3')), state)
  prefix = f'{schedule}/resume10001'
  assert_parameters(unstack_layers(params), prefix, [
      name for name in LEAVES if f'{prefix}/{name}' in DATA])


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_schedules_are_t5x(schedule):
  for step, expected in zip(
      DATA['schedule/steps'], DATA[f'schedule/{schedule}'], strict=True):
    actual = SCHEDULES[schedule](jnp.asarray(step))
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def step_in_float64(params, gradients, moments, step, rate):
  """One step of Adafactor as T5X's formulas have it, for one leaf."""
  decay = 1 - (step + 1) ** -0.8
  squares = gradients.astype(np.float64) ** 2 + 1e-30
  if params.ndim == 2 and min(params.shape) >= 128:
    rows = decay * moments[0] + (1 - decay) * squares.mean(1)
    columns = decay * moments[1] + (1 - decay) * squares.mean(0)
    update = gradients / np.sqrt(np.outer(rows, columns) / rows.mean())
    moments = rows, columns
  else:
    moments = decay * moments[0] + (1 - decay) * squares,
    update = gradients / np.sqrt(moments[0])
  update /= max(1.0, np.sqrt((update ** 2).mean()))
  scale = max(np.sqrt((params ** 2).mean()), 1e-3)
  return params - rate * scale * update, moments


@pytest.mark.parametrize('shape', [
    (300, 160), (160, 300), (128, 128), (127, 400), (130,)])
def test_adafactor_by_its_formulas(shape):
  """Tall, wide and square, at the size from which leaves are factored; a
  third of the rows without gradient, as in an embedding."""
  generator = np.random.default_rng(shape[0])
  params = generator.standard_normal(shape).astype(np.float32)
  optimizer = make_optimizer(settings('adafactor'), SCHEDULES['rsqrt'])
  ours = {'token_embedder': {'embedding': jnp.asarray(params)}}
  state, expected, moments = optimizer.init(ours), params, (0.0, 0.0)
  for step in range(3):
    gradients = generator.standard_normal(shape).astype(np.float32)
    gradients[generator.random(shape[0]) < 0.3] = 0
    ours, state = apply(optimizer)(
        ours, {'token_embedder': {'embedding': jnp.asarray(gradients)}}, state)
    expected, moments = step_in_float64(
        expected, gradients, moments, step, 0.01)
    actual = np.asarray(ours['token_embedder']['embedding'])
    units = np.abs(actual - expected).max() / np.abs(expected).max() * 2 ** 24
    assert units <= UNITS, f'step {step}: {units:.1f} units'


def test_adamw_by_its_formulas():
  """Decay of matrices only; stacked layers as unstacked."""
  optimizer = make_optimizer(settings('adamw'), SCHEDULES['constant'])
  results = []
  for layout in (lambda tree: tree, stack_layers):
    params = layout(tree('params0'))
    state = optimizer.init(params)
    for step in (1, 2, 3):
      params, state = apply(optimizer)(
          params, layout(tree(f'grad{step}')), state)
    results.append(golden.flatten(unstack_layers(params)))
  for name in LEAVES:
    expected = DATA[f'params0/{name}'].astype(np.float64)
    first = second = 0.0
    for step in (1, 2, 3):
      gradients = DATA[f'grad{step}/{name}'].astype(np.float64)
      first = 0.9 * first + 0.1 * gradients
      second = 0.95 * second + 0.05 * gradients ** 2
      update = (first / (1 - 0.9 ** step)) / (
          np.sqrt(second / (1 - 0.95 ** step)) + 1e-8)
      if name.rpartition('/')[2] in ('kernel', 'embedding'):
        update += 0.1 * expected
      expected = expected - 1e-3 * update
    for result in results:
      golden.assert_close(result[name], expected, what=name)


def test_gradients_are_clipped_by_their_common_norm():
  """Adafactor's first step does not see a gradient's size; AdamW's epsilon
  does, once the gradients are tiny."""
  params, gradients = tree('params0'), tree('grad1')
  norm = optax.tree.norm(gradients)
  clipped = make_optimizer(
      settings('adamw', clip_global_norm=1e-8), SCHEDULES['constant'])
  plain = make_optimizer(settings('adamw'), SCHEDULES['constant'])
  actual, _ = apply(clipped)(params, gradients, clipped.init(params))
  gradients = jax.tree.map(lambda x: x * (1e-8 / norm), gradients)
  expected, _ = apply(plain)(params, gradients, plain.init(params))
  golden.assert_trees_close(actual, expected)


def test_unknown_name():
  with pytest.raises(ConfigError, match=r"optimizer\.name='sgdw' must be one"):
    make_optimizer(settings('sgdw'), SCHEDULES['constant'])
