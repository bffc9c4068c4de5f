"""What the backward pass computes again, and what it finds in memory."""

import functools

import jax
import jax.numpy as jnp
import pytest

from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.model import attention_choice, decoder, encoder
from longt5_flax.model.fused_attention import (
    fused_attention,
    fused_causal_attention,
)
from longt5_flax.model.kernels.calls import KernelOptions
from longt5_flax.model.segment_attention import segment_attention
from longt5_flax.training import partitioning

LENGTH, LAYERS = 64, 2
TOKENS = jnp.full((2, LENGTH), 5)
# Products with parameters: of a layer of the encoder q, k, v, out, k and v of
# global tokens, three of the MLP; of the decoder twice four and three.
PRODUCTS = LAYERS * (9 + 11)


@pytest.fixture(params=['gpu', 'tpu'])
def kernels(monkeypatch, request):
  options = KernelOptions(16, interpret=True, platform=request.param)
  monkeypatch.setattr(
      attention_choice, 'target_platform', lambda: request.param)
  for module, attend in ((encoder, fused_attention),
                         (decoder, segment_attention),
                         (decoder, fused_causal_attention)):
    monkeypatch.setattr(module, attend.__name__, functools.partial(
        attend, options=options))
  return request.param


def model_of(remat, attention='fused', **options):
  config = LongT5Config(
      vocab_size=50, d_model=16, d_kv=8, num_heads=2, d_ff=24,
      num_layers=LAYERS, local_radius=7, global_block_size=4, dropout_rate=0.3,
      encoder_attention_type='transient-global',
      feed_forward_proj='gated-gelu')
  return LongT5ForConditionalGeneration(
      config, remat=remat, attention=attention, **options)


def gradient_program(remat, attention='fused', **options):
  """The program of the gradient, which is not run."""
  model = model_of(remat, attention, **options)

  def loss(params):
    return jnp.sum(model.apply(
        {'params': params}, TOKENS, TOKENS[:, :16], with_head=False,
        deterministic=False, rngs={'dropout': jax.random.key(0)}))

  params = jax.eval_shape(
      model_of('none', 'reference', **options).init, jax.random.key(0),
      TOKENS, TOKENS[:, :16])
  return jax.make_jaxpr(jax.grad(loss))(params['params']).jaxpr


def programs(program):
  """A program and those in it, without those of kernels."""
  yield program
  for equation in program.eqns:
    if equation.primitive.name == 'pallas_call':
      continue
    for value in jax.tree.leaves(
        equation.params, is_leaf=lambda x: hasattr(x, 'eqns')
        or hasattr(x, 'jaxpr')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from programs(inner)


def equations(program):
  for each in programs(program):
    yield from each.eqns


def kernel_calls(program):
  """How often each kernel is called. JAX leaves calls where nobody needs their
  results to the compiler, which removes them."""
  names = []
  for each in programs(program):
    needed = {id(x) for x in each.outvars}
    for equation in reversed(each.eqns):
      if needed.isdisjoint(map(id, equation.outvars)):
        continue
      needed |= {id(x) for x in equation.invars}
      if equation.primitive.name == 'pallas_call':
        names.append(equation.params['name'])
  return {name: names.count(name) for name in set(names)}


def products_with_parameters(program):
  """Matrix products without batch dimensions."""
  return sum(
      equation.primitive.name == 'dot_general'
      and not equation.params['dimension_numbers'][1][0]
      for equation in equations(program))


@pytest.mark.parametrize('on_a_mesh', [False, True])
def test_kernels_run_again(kernels, on_a_mesh):
  """Forward kernels once under `dots`, twice where layers are recomputed."""
  def calls(remat):
    if not on_a_mesh:
      return kernel_calls(gradient_program(remat))
    mesh = partitioning.make_mesh(
        {'data': 2, 'fsdp': 1, 'tensor': 2, 'sequence': 1}, jax.devices()[:4])
    with partitioning.active(mesh):
      return kernel_calls(gradient_program(remat))

  none = calls('none')
  forward = {name for name in none if '_backward' not in name}
  assert len(forward) == (3 if kernels == 'gpu' else 2)
  of_encoder_and_decoder = {
      f'longt5_attention_{name}' for name in (
          'forward', 'backward_query', 'backward_key', 'backward_local_bias')
      if kernels == 'gpu'}
  assert none == {name: LAYERS * (1 + (name in of_encoder_and_decoder))
                  for name in none}
  assert calls('dots') == none
  again = none | {name: 2 * none[name] for name in forward}
  assert calls('layer') == again
  assert calls('offload') == again


@pytest.mark.parametrize('kernels', ['gpu'], indirect=True)
def test_products_run_again(kernels):
  none, dots, layer = (
      products_with_parameters(gradient_program(remat))
      for remat in ('none', 'dots', 'layer'))
  assert none == 3 * PRODUCTS
  assert dots == none
  # All but the last of a layer, on which no gradient depends.
  assert layer == none + PRODUCTS - 2 * LAYERS


def test_chunks_are_not_recomputed_twice():
  """Under `dots` as under `none`, where chunks recompute themselves."""
  none, dots, layer = (
      sum(equation.primitive.name == 'exp' for equation in equations(
          gradient_program(remat, 'chunked')))
      for remat in ('none', 'dots', 'layer'))
  assert none < layer
  assert dots < layer


@pytest.mark.parametrize('scan_layers', [False, True])
def test_offload_keeps_inputs_of_layers_in_the_hosts_memory(scan_layers):
  """And no others, in a loop as without one."""
  program = gradient_program(
      'offload', 'reference', scan_layers=scan_layers, scan_unroll=1)
  moved = [equation.outvars[0].aval.shape for equation in equations(program)
           if equation.primitive.name == 'device_put'
           and equation.params['devices'] == (jax.memory.Space.Host,)]
  each = 1 if scan_layers else LAYERS
  assert sorted(moved) == sorted(
      [(2, LENGTH, 16)] * each + [(2, 16, 16)] * each)


@pytest.mark.parametrize('kernels', ['gpu'], indirect=True)
def test_waits_no_larger_than_it_must(kernels):
  """In a loop, of arrays as large as a layer's input: what is added to twice,
  what attention and MLP get, and what `out` gets; no mask and no product of a
  norm, with dropout or without."""
  loops = [equation for equation in gradient_program(
      'none', scan_layers=True, scan_unroll=1).eqns
      if equation.primitive.name == 'scan' and not equation.params['reverse']]
  kept = [variable.aval for variable in loops[0].outvars
          if variable.aval.shape == (LAYERS, 2, LENGTH, 16)]
  assert {x.dtype.name for x in kept} == {'float32'}
  assert len(kept) == 5
