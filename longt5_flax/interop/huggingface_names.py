"""Hugging Face's names of LongT5's parameters.

In its PyTorch files kernels are [out, in] and bias tables [buckets, heads], the
transposes of ours; in the files of the removed Flax classes kernels are as ours
and only the tables transposed.
"""

from longt5_flax.config import LongT5Config

EMBEDDING = 'shared.weight'
HEAD = 'lm_head.weight'
DECODER_NORM = 'decoder.final_layer_norm.weight'
# Copies of the embedding that some files hold.
EMBEDDING_COPIES = ('encoder.embed_tokens.weight',
                    'decoder.embed_tokens.weight')
# Left over from T5's first version; no implementation uses it.
UNUSED = ('decoder.block.0.layer.1.EncDecAttention.relative_attention_bias'
          '.weight',)

OUR_EMBEDDING = 'token_embedder/embedding'
OUR_HEAD = 'decoder/logits_dense/kernel'

# The encoder's attention is named after its type; 'full' is plain T5's.
_ENCODER_ATTENTION = {
    'local': 'LocalSelfAttention',
    'transient-global': 'TransientGlobalSelfAttention',
    'full': 'SelfAttention',
}
_PROJECTIONS = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}


def huggingface_names(config: LongT5Config) -> dict[str, str]:
  """Our unrolled name to Hugging Face's, for every tensor of a model.

  The head is among them whether `config` has one or not.
  """
  names = {OUR_EMBEDDING: EMBEDDING, OUR_HEAD: HEAD}
  attention = _ENCODER_ATTENTION[config.encoder_attention_type]
  first = f'encoder.block.0.layer.0.{attention}'
  names['encoder/relpos_bias/rel_embedding'] = (
      f'{first}.relative_attention_bias.weight')
  names['decoder/relpos_bias/rel_embedding'] = (
      'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight')
  if config.encoder_attention_type == 'transient-global':
    names['encoder/side_relpos_bias/rel_embedding'] = (
        f'{first}.global_relative_attention_bias.weight')
  for stack in ('encoder', 'decoder'):
    names[f'{stack}/{stack}_norm/scale'] = f'{stack}.final_layer_norm.weight'
  for i in range(config.num_layers):
    names |= _encoder_layer(config, f'encoder/layers_{i}',
                            f'encoder.block.{i}.layer', attention)
  # Never None once the config is made.
  for i in range(config.num_decoder_layers or 0):
    names |= _decoder_layer(config, f'decoder/layers_{i}',
                            f'decoder.block.{i}.layer')
  return names


def _encoder_layer(config, ours, theirs, attention):
  names = {
      f'{ours}/pre_attention_layer_norm/scale': f'{theirs}.0.layer_norm.weight',
      f'{ours}/pre_mlp_layer_norm/scale': f'{theirs}.1.layer_norm.weight',
      **_projections(f'{ours}/attention', f'{theirs}.0.{attention}'),
      **_mlp(config, ours, f'{theirs}.1'),
  }
  if config.encoder_attention_type == 'transient-global':
    names[f'{ours}/attention/T5LayerNorm_0/scale'] = (
        f'{theirs}.0.{attention}.global_input_layer_norm.weight')
  return names


def _decoder_layer(config, ours, theirs):
  norms = ('pre_self_attention_layer_norm', 'pre_cross_attention_layer_norm',
           'pre_mlp_layer_norm')
  return {
      **{f'{ours}/{norm}/scale': f'{theirs}.{i}.layer_norm.weight'
         for i, norm in enumerate(norms)},
      **_projections(f'{ours}/self_attention', f'{theirs}.0.SelfAttention'),
      **_projections(f'{ours}/encoder_decoder_attention',
                     f'{theirs}.1.EncDecAttention'),
      **_mlp(config, ours, f'{theirs}.2'),
  }


def _projections(ours, theirs):
  return {f'{ours}/{name}/kernel': f'{theirs}.{letter}.weight'
          for name, letter in _PROJECTIONS.items()}


def _mlp(config, ours, theirs):
  kernels = ('wi_0', 'wi_1', 'wo') if config.gated else ('wi', 'wo')
  return {f'{ours}/mlp/{kernel}/kernel':
              f'{theirs}.DenseReluDense.{kernel}.weight' for kernel in kernels}


def from_flax_name(name: str) -> str:
  """The PyTorch files' name of a tensor in a Flax file.

  Those are paths, `encoder/block/0/layer/0/SelfAttention/q/kernel`, and end in
  `kernel`, `embedding` (bias tables too) or, norms, in `weight`.
  """
  *parts, last = name.split('/')
  return '.'.join([*parts, 'weight' if last in ('kernel', 'embedding')
                   else last])


def is_transposed(name: str, stored: str) -> bool:
  """Whether a file holds the transpose of our tensor.

  Args:
    name: ours.
    stored: the file's, of PyTorch or Flax.
  """
  return (name.endswith(('/kernel', '/rel_embedding'))
          != stored.endswith('/kernel'))
