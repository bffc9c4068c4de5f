"""LongT5Config: defaults, named sizes, files, and every refusal."""

import dataclasses
import json

import jaxtyping
import pytest

import golden
from longt5_flax import LongT5Config
from longt5_flax.config import PRESETS, ConfigError

# transformers.LongT5Config() of 4.57.6, what it and this class both have.
HF_DEFAULTS = dict(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6,
    num_decoder_layers=6, num_heads=8, local_radius=127, global_block_size=16,
    relative_attention_num_buckets=32, relative_attention_max_distance=128,
    dropout_rate=0.1, layer_norm_epsilon=1e-6, initializer_factor=1.0,
    feed_forward_proj='relu', encoder_attention_type='local',
    tie_word_embeddings=True, pad_token_id=0, eos_token_id=1)

# layers, d_model, d_ff, heads, d_kv: LongT5's gin files, and our own tiny.
SIZES = {
    'tiny': (2, 64, 128, 4, 16),
    'small': (8, 512, 1024, 6, 64),
    'base': (12, 768, 2048, 12, 64),
    'large': (24, 1024, 2816, 16, 64),
    'xl': (24, 2048, 5120, 32, 64),
    'xxl': (24, 4096, 10240, 64, 64),
}
FAMILIES = {
    'local': ('local', 32128),
    'tglobal': ('transient-global', 32128),
    'full': ('full', 32128),
    'mlongt5': ('transient-global', 256384),
}


@pytest.fixture
def as_users_call_it():
  """Without the tests' own checks of annotations, which would come first."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield
  jaxtyping.config.update('jaxtyping_disable', False)


def test_defaults_are_those_of_hugging_face():
  own = dict(scale_decoder_outputs=True, decoder_start_token_id=0)
  assert dataclasses.asdict(LongT5Config()) == HF_DEFAULTS | own


def test_presets_are_all_families_in_all_sizes():
  assert set(PRESETS) == {
      f'{family}-{size}' for family in FAMILIES for size in SIZES}


@pytest.mark.parametrize('name', PRESETS)
def test_preset(name):
  family, size = name.split('-')
  config = LongT5Config.preset(name)
  assert (config.num_layers, config.d_model, config.d_ff, config.num_heads,
          config.d_kv) == SIZES[size]
  assert config.num_decoder_layers == config.num_layers
  assert (config.encoder_attention_type, config.vocab_size) == FAMILIES[family]
  assert config.gated
  assert not config.tie_word_embeddings
  assert not config.scale_decoder_outputs


def test_preset_with_other_fields():
  config = LongT5Config.preset(
      'tglobal-base', num_layers=3, local_radius=255, feed_forward_proj='relu')
  assert (config.num_layers, config.num_decoder_layers) == (3, 3)
  assert (config.local_radius, config.d_model) == (255, 768)
  assert not config.gated


@pytest.mark.parametrize('values, scaled', [
    (dict(tie_word_embeddings=True), True),
    (dict(tie_word_embeddings=False), False),
    (dict(tie_word_embeddings=True, scale_decoder_outputs=False), False),
    (dict(tie_word_embeddings=False, scale_decoder_outputs=True), True),
])
def test_scale_follows_the_tie_unless_said(values, scaled):
  assert LongT5Config(**values).scale_decoder_outputs is scaled


def test_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    LongT5Config().d_model = 3  # type: ignore[misc]


@pytest.mark.parametrize('config', [
    LongT5Config(), LongT5Config.preset('mlongt5-xl'),
    LongT5Config(num_layers=12, num_decoder_layers=4, d_model=1472,
                 num_heads=6, scale_decoder_outputs=False),
])
def test_round_trip_through_a_file(config, tmp_path):
  values = config.to_dict()
  assert values['model_type'] == 'longt5'
  assert values['is_encoder_decoder'] is True
  (tmp_path / 'config.json').write_text(json.dumps(values))
  assert LongT5Config.from_pretrained(str(tmp_path)) == config
  assert LongT5Config.from_dict(values) == config


@pytest.mark.usefixtures('as_users_call_it')
def test_other_keys_and_nulls_are_left_alone():
  """Files of Hugging Face hold both."""
  config = LongT5Config.from_dict(dict(
      d_model=96, num_decoder_layers=None, scale_decoder_outputs=None,
      dropout_rate=0, n_positions=4096, task_specific_params={'a': 1}))
  assert config == LongT5Config(d_model=96, dropout_rate=0)


@pytest.mark.parametrize('more', [
    {}, {'dense_act_fn': 'gelu_new', 'is_gated_act': True},
    {'dense_act_fn': None}])
def test_old_and_new_files_of_the_released_models(more):
  """Old ones lack what is derived, and `global_block_size`."""
  config = LongT5Config.from_dict(
      {'feed_forward_proj': 'gated-gelu', 'model_type': 'longt5'} | more)
  assert config.gated
  assert config.global_block_size == 16


@pytest.mark.parametrize('name, value, derived', [
    ('dense_act_fn', 'silu', 'gelu_new'), ('is_gated_act', False, True)])
def test_files_that_contradict_themselves(name, value, derived):
  with pytest.raises(ConfigError) as caught:
    LongT5Config.from_dict({'feed_forward_proj': 'gated-gelu', name: value})
  assert str(caught.value) == (f'{name}={value!r} must be {derived!r}, as '
                               "feed_forward_proj='gated-gelu' says.")


@pytest.mark.parametrize('name', golden.names('hf_'))
def test_reads_config_files_that_transformers_wrote(name):
  text = str(golden.read(name)['config_json'])
  written, config = json.loads(text), LongT5Config.from_dict(json.loads(text))
  for field, value in dataclasses.asdict(config).items():
    if field != 'scale_decoder_outputs' and written.get(field) is not None:
      assert value == written[field], field


@pytest.mark.parametrize('name', [
    'vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_layers',
    'num_decoder_layers', 'num_heads', 'local_radius', 'global_block_size'])
def test_sizes_below_one(name):
  refuses({name: 0}, f'{name}=0 must be at least 1.')


@pytest.mark.parametrize('values, message', [
    (dict(dropout_rate=1.0), 'dropout_rate=1.0 must be in [0, 1).'),
    (dict(dropout_rate=-0.1), 'dropout_rate=-0.1 must be in [0, 1).'),
    (dict(feed_forward_proj='gelu'), "feed_forward_proj='gelu' must be one of "
     "('relu', 'gated-gelu')."),
    (dict(encoder_attention_type='tglobal'),
     "encoder_attention_type='tglobal' must be one of ('local', "
     "'transient-global', 'full')."),
    (dict(pad_token_id=-1),
     'pad_token_id=-1 must be in [0, vocab_size=32128).'),
    (dict(eos_token_id=96, vocab_size=96),
     'eos_token_id=96 must be in [0, vocab_size=96).'),
    (dict(decoder_start_token_id=99999),
     'decoder_start_token_id=99999 must be in [0, vocab_size=32128).'),
    (dict(relative_attention_num_buckets=2),
     'relative_attention_num_buckets=2 must be even and at least 4.'),
    (dict(relative_attention_num_buckets=31),
     'relative_attention_num_buckets=31 must be even and at least 4.'),
    (dict(relative_attention_max_distance=16),
     'relative_attention_max_distance=16 must be greater than half of '
     'relative_attention_num_buckets=32.'),
])
def test_refused_values(values, message):
  refuses(values, message)


@pytest.mark.usefixtures('as_users_call_it')
@pytest.mark.parametrize('values, message', [
    (dict(d_model=512.0), 'd_model=512.0 must be of type int.'),
    (dict(num_decoder_layers='6'),
     "num_decoder_layers='6' must be of type int."),
    (dict(num_heads=True), 'num_heads=True must be of type int.'),
    (dict(dropout_rate='0.1'), "dropout_rate='0.1' must be of type float."),
    (dict(layer_norm_epsilon=False),
     'layer_norm_epsilon=False must be of type float.'),
    (dict(tie_word_embeddings=1),
     'tie_word_embeddings=1 must be of type bool.'),
    (dict(scale_decoder_outputs='no'),
     "scale_decoder_outputs='no' must be of type bool."),
    (dict(feed_forward_proj=3), 'feed_forward_proj=3 must be of type str.'),
])
def test_refused_types(values, message):
  refuses(values, message)


def refuses(values, message):
  with pytest.raises(ConfigError) as caught:
    LongT5Config(**values)
  assert str(caught.value) == message


def test_unknown_preset():
  with pytest.raises(ConfigError) as caught:
    LongT5Config.preset('tglobal-huge')
  assert str(caught.value) == (
      "preset='tglobal-huge' must be one of " + ', '.join(PRESETS) + '.')


def test_unknown_field():
  with pytest.raises(TypeError, match='d_modle'):
    LongT5Config.preset('local-tiny', d_modle=3)


@pytest.mark.parametrize('content, message', [
    (None, '{path}: cannot be read (No such file or directory).'),
    ('{"d_model": ', '{path}: is not JSON (Expecting value: line 1 column 13 '
     '(char 12)).'),
    ('[1]', '{path}: must hold a JSON object.'),
    ('{"d_kv": 0}', 'd_kv=0 must be at least 1.'),
    ('{"model_type": "t5"}', "{path}: model_type='t5' is not a LongT5's, which "
     "is 'longt5'."),
])
def test_refused_files(tmp_path, content, message):
  path = tmp_path / 'config.json'
  if content is not None:
    path.write_text(content)
  with pytest.raises(ConfigError) as caught:
    LongT5Config.from_pretrained(str(tmp_path))
  assert str(caught.value) == message.format(path=path)
