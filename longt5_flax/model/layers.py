"""The parts that encoder and decoder share: projections, norm, MLP, dropout,
embedding, attention biases, and the loop over layers.

Parameter names are those of the released T5X checkpoints.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.config import LongT5Config
from longt5_flax.model.kernels.calls import ATTENDED, LAYOUT
from longt5_flax.model.precision import activation_dtype, contract
from longt5_flax.model.relative_position import offset_bias

# Values that can be recomputed for less than it costs to keep them in a loop
# over layers. Without one the compiler shares or recomputes as it sees fit.
_cheap = partial(jax.checkpoint, prevent_cse=False)

REMAT_POLICIES = ('none', 'dots', 'layer', 'offload')
_LAYER_INPUT = 'layer_input'
_NORM = 'norm'
_FEATURES_LAST = Layout((0, 1, 2))


def fan_in_init(scale: float = 1.0) -> Callable[..., Array]:
  """T5.1.1's initialiser of kernels: normal, cut at two deviations, with
  variance scale / rows."""
  return nn.initializers.variance_scaling(scale, 'fan_in', 'truncated_normal')


class Dense(nn.Module):
  """A linear map without bias.

  Attributes:
    features: size of the output.
    dtype: of the product.
    out_dtype: of the result; by default what activations are stored in.
    init_scale: multiplies the initial variance.
  """
  features: int
  dtype: DTypeLike
  out_dtype: DTypeLike | None = None
  init_scale: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L F']:
    kernel = self.param('kernel', fan_in_init(self.init_scale),
                        (x.shape[-1], self.features), jnp.float32)
    return contract('BLD,DF->BLF', x, kernel, self.dtype, self.out_dtype)


class T5LayerNorm(nn.Module):
  """Scales by the root mean square over features, in float32; no mean, no
  bias."""
  epsilon: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D']) -> Float[Array, 'B L D']:
    scale = self.param(
        'scale', nn.initializers.ones, (x.shape[-1],), jnp.float32)
    # Left to itself XLA puts features first, as the products that give weights'
    # gradients like it, and norms then sum over the slow axis.
    x = with_layout_constraint(x, _FEATURES_LAST)
    return _scale_by_norm(self.epsilon, x, scale).astype(
        activation_dtype(self.dtype))


@partial(_cheap, static_argnums=0,
         policy=jax.checkpoint_policies.save_only_these_names(_NORM))
def _scale_by_norm(epsilon, x, scale):
  """Keeps x and its inverse norm."""
  x = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  inverse = checkpoint_name(jax.lax.rsqrt(mean_square + epsilon), _NORM)
  return x * inverse * scale


@_cheap
def zero_unless(mask: Bool[Array, '...'], x: Float[Array, '...']) -> Array:
  """Keeps the mask as it is, not as large as x."""
  return jnp.where(mask, x, 0)


class Dropout(nn.Module):
  """nn.Dropout that keeps a mask of 1 along `broadcast_dims`."""
  rate: float
  broadcast_dims: tuple[int, ...]

  @nn.compact
  def __call__(self, x: Float[Array, '...'], deterministic: bool) -> Array:
    if deterministic or self.rate == 0:
      return x
    keep = 1.0 - self.rate
    shape = [1 if axis in self.broadcast_dims else size
             for axis, size in enumerate(x.shape)]
    mask = jax.random.bernoulli(self.make_rng('dropout'), keep, shape)
    return zero_unless(mask, x / keep)


def layer_dropout(rate: float) -> Dropout:
  """T5's dropout: one mask for all positions (axis 1) of a row."""
  return Dropout(rate, broadcast_dims=(1,))


def attention_dropout(rate: float) -> Dropout:
  """T5's dropout of attention weights, one mask for all queries.

  A mask [B, H, 1, keys] on the weights equals [B, keys, H, 1] on the values
  [B, keys, H, K], which is where it is applied: no implementation of attention
  needs to know.
  """
  return Dropout(rate, broadcast_dims=(3,))


class MLP(nn.Module):
  """T5.1.1's gated GELU (tanh form), or T5.0's relu."""
  config: LongT5Config
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D'],
               deterministic: bool) -> Float[Array, 'B L D']:
    config = self.config
    if config.gated:
      hidden = _gated_gelu(*(
          Dense(config.d_ff, self.dtype, name=name)(x)
          for name in ('wi_0', 'wi_1')))
    else:
      hidden = nn.relu(Dense(config.d_ff, self.dtype, name='wi')(x))
    hidden = layer_dropout(config.dropout_rate)(hidden, deterministic)
    output = Dense(config.d_model, self.dtype, jnp.float32, name='wo')(hidden)
    # LongT5's configuration drops here and once more after the layer.
    return layer_dropout(config.dropout_rate)(output, deterministic)


@jax.checkpoint
def _gated_gelu(gate: Array, linear: Array) -> Array:
  """Keeps its operands for the backward pass and nothing in between."""
  return nn.gelu(gate, approximate=True) * linear


class Embed(nn.Module):
  """The token embedding, shared by encoder and decoder."""
  config: LongT5Config

  def setup(self):
    self.embedding = self.param(
        'embedding', nn.initializers.normal(self.config.initializer_factor),
        (self.config.vocab_size, self.config.d_model), jnp.float32)

  def __call__(self, tokens: Int[Array, 'B L']) -> Float[Array, 'B L D']:
    # Float32 also of narrow parameters: here the residual stream begins.
    return jnp.take(self.embedding, tokens, axis=0).astype(jnp.float32)

  def attend(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """Float32 logits, the embedding serving as the output layer."""
    return jnp.einsum('BTD,VD->BTV', x, self.embedding)


class RelativePositionBias(nn.Module):
  """One table of biases, shared by all layers of a stack.

  Called with a range of offsets, gives [H, offsets] in float32.
  """
  config: LongT5Config
  bidirectional: bool

  @nn.compact
  def __call__(self, first: int, last: int) -> Float[Array, 'H offsets']:
    config = self.config
    table = self.param(
        'rel_embedding',
        nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
        (config.num_heads, config.relative_attention_num_buckets), jnp.float32)
    return offset_bias(
        table.astype(jnp.float32), first, last,
        bidirectional=self.bidirectional,
        max_distance=config.relative_attention_max_distance)


class Projections(nn.Module):
  """Query, key, value and output projections of one attention layer."""
  config: LongT5Config
  dtype: DTypeLike

  def setup(self):
    config = self.config
    joined = config.num_heads * config.d_kv
    factor = config.initializer_factor
    # The 1/sqrt(K) that T5 leaves out of its attention.
    self.query = Dense(joined, self.dtype, init_scale=factor / config.d_kv)
    self.key = Dense(joined, self.dtype, init_scale=factor)
    self.value = Dense(joined, self.dtype, init_scale=factor)
    self.out = Dense(
        config.d_model, self.dtype, jnp.float32, init_scale=factor)
    self.dropout = attention_dropout(config.dropout_rate)

  def project_query(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T H K']:
    return self._split(self.query(x))

  def project_key_value(
      self, x: Float[Array, 'B S D'], deterministic: bool
  ) -> tuple[Float[Array, 'B S H K'], Float[Array, 'B S H K']]:
    value = self.dropout(self._split(self.value(x)), deterministic)
    return self._split(self.key(x)), value

  def project_out(self, x: Float[Array, 'B T H K']) -> Float[Array, 'B T D']:
    return self.out(x.reshape(*x.shape[:2], -1))

  def _split(self, x):
    return x.reshape(*x.shape[:2], self.config.num_heads, self.config.d_kv)


def make_layers(
    make_layer: Callable[[], nn.Module], num_layers: int, scan: bool
) -> Any:
  """The layers of a stack, for `run_layers`; assign to `self.layers` in setup.

  Flax names a list's members `layers_0`, `layers_1`, ...; stacked layers are
  one subtree `layers` with a leading axis.
  """
  return make_layer() if scan else [make_layer() for _ in range(num_layers)]


def run_layers(
    layers: Any,
    call: Callable[[Any, Any, Any], Any],
    num_layers: int,
    carry: Any,
    context: Any,
    remat: str = 'none',
    unroll: int = 1,
) -> Any:
  """Applies `call(layer, carry, context)` for every layer of a stack.

  Args:
    layers: what `make_layers` made.
    call: gives the new carry.
    num_layers: how many.
    carry: what goes from layer to layer.
    context: what all layers see.
    remat: what the backward pass finds in memory: 'none' recomputes nothing,
      'dots' keeps the results of projections and of attention, 'layer' keeps
      only what goes from layer to layer, 'offload' that in the host's memory.
    unroll: so many stacked layers make one turn of the loop over them; 0: all,
      and there is no loop.
  """
  scan = not isinstance(layers, (list, tuple))
  if remat != 'none':
    # In a loop, what is recomputed is in another body than what it repeats.
    loop = scan and 0 < unroll < num_layers
    call = nn.remat(_name_input(call), policy=_remat_policy(remat),
                    prevent_cse=not loop)
  if not scan:
    for layer in layers:
      carry = call(layer, carry, context)
    return carry
  scanned = nn.scan(
      lambda layer, carry, context: (call(layer, carry, context), None),
      variable_axes={'params': 0, 'encoded': 0, 'cache': 0,
                     'intermediates': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=nn.broadcast, length=num_layers, unroll=unroll or num_layers)
  return scanned(layers, carry, context)[0]


def _name_input(call):
  return lambda layer, carry, context: call(
      layer, checkpoint_name(carry, _LAYER_INPUT), context)


def _remat_policy(remat):
  """What the backward pass of a layer finds in memory besides its inputs; of
  'offload', in place of its input."""
  policies = jax.checkpoint_policies
  if remat == 'offload':
    return policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[LAYOUT],
        names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src='device', offload_dst='pinned_host')
  if remat == 'layer':
    return policies.save_only_these_names(LAYOUT)
  return policies.save_from_both_policies(
      policies.dots_with_no_batch_dims_saveable,
      policies.save_only_these_names(ATTENDED, LAYOUT))
