"""T5X checkpoints: one that T5X wrote, and others made here in its layouts."""

import functools
import hashlib
import http.server
import re
import shutil
import tarfile
import threading
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import LongT5Config
from longt5_flax.interop.t5x import open_t5x
from longt5_flax.interop.tensors import WeightsError, check_tensors
from t5x_files import (
    SIZES,
    assert_same,
    random_tensors,
    read_all,
    scanned,
    write_t5x,
)

# Of the names and bytes of flaxformer_tglobal_unpacked's parameters.
DIGEST = 'b628282977a21e94db6e788a5d01f2026e3a60734cc4485ce4ab1745717a04f7'
QUERY = 'encoder/layers_0/attention/query/kernel'
TABLE = 'encoder/relpos_bias/rel_embedding'


@pytest.fixture(scope='session')
def released(tmp_path_factory, testdata) -> Path:
  """The folder of a checkpoint that T5X wrote."""
  folder = tmp_path_factory.mktemp('t5x')
  with tarfile.open(
      testdata / 'golden' / 't5x_checkpoint_tglobal.tar.xz') as tar:
    tar.extractall(folder, filter='data')
  return folder / 't5x_checkpoint_tglobal' / 'checkpoint_1000000'


def digest(tensors):
  total = hashlib.sha256()
  for name, array in sorted(read_all(tensors).items()):
    total.update(name.encode())
    total.update(np.ascontiguousarray(array).tobytes())
  return total.hexdigest()


def test_released_checkpoint_is_bit_equal(released):
  """And the optimizer's arrays, which are not there, are not missed."""
  tensors = open_t5x(str(released))
  assert digest(tensors) == DIGEST
  assert {*tensors.dtypes.values()} == {np.dtype(np.float32)}
  assert tensors.config == LongT5Config(
      encoder_attention_type='transient-global', **SIZES)
  report = '\n'.join(tensors.report)
  assert 'optimizer state: not read.' in report
  assert "num_heads=4, d_kv=8, vocab_size=96" in report
  assert 'as published: local_radius=127, global_block_size=16' in report


def test_index_written_in_a_bucket(released, tmp_path):
  """Its specs name a bucket that is nowhere, and have the path elsewhere."""
  folder = tmp_path / 'checkpoint_7'
  shutil.copytree(released, folder)
  shutil.copy(released.parent / 'gcs_index' / 'checkpoint', folder)
  assert digest(open_t5x(str(folder))) == DIGEST


@pytest.mark.skipif(not golden.COMPLETE, reason='needs LONGT5_GOLDEN')
@pytest.mark.parametrize('kind', ['local', 'tglobal'])
def test_complete_golden_checkpoints(kind):
  tensors = open_t5x(f'{golden.COMPLETE}/t5x_checkpoint_{kind}')
  expected = golden.flatten(golden.load(f'flaxformer_{kind}_unpacked').params)
  assert_same(tensors, expected)


class Server(http.server.SimpleHTTPRequestHandler):
  """Serves files, and is silent about it."""

  def log_message(self, *args):
    del args


@pytest.fixture
def url(released):
  handler = functools.partial(Server, directory=str(released.parent))
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def test_a_url(url, released):
  assert digest(open_t5x(f'{url}/checkpoint_1000000')) == DIGEST
  assert digest(open_t5x(f'file://{released}/')) == DIGEST


@pytest.mark.parametrize('path, message', [
    ('{url}/checkpoint_9', '{path}: no T5X checkpoint: it has no file '
     'checkpoint.'),
    ('ftp://host/x', "{path}: Parsing spec from url: \"ftp://host/x/\": "
     'unsupported URL scheme "ftp" in "ftp://host/x/".'),
])
def test_a_url_without_a_checkpoint(path, message, url):
  path = path.format(url=url)
  refuses(path, re.escape(message.format(path=path)))


def refuses(path, message):
  """Opening and reading all raises one line, which matches `message`."""
  with pytest.raises(WeightsError) as caught:
    read_all(open_t5x(str(path)))
  assert re.fullmatch(message, str(caught.value)), caught.value


@pytest.mark.parametrize('inside, table, side', [
    (None, 'relpos_bias', True), (None, 'relpos_bias', False),
    ('layers', 'relpos_bias', False), ('layers', 'relative_posemb', False)])
def test_scanned_layers(inside, table, side, tmp_path):
  tensors = random_tensors(side)
  arrays = scanned(tensors, inside, table)
  assert arrays[f'encoder/{inside or "encoder"}/mlp/wo/kernel'].shape == (
      64, 2, 32)
  opened = open_t5x(str(write_t5x(tmp_path / 'checkpoint_1', arrays)))
  assert_same(opened, tensors)
  assert 'layers: stacked along axis 1 there.' in opened.report
  assert opened.config.num_layers == opened.config.num_decoder_layers == 2
  assert opened.config.encoder_attention_type == (
      'transient-global' if side else 'local')


def heads_apart(name, array):
  if not re.search(r'attention/(query|key|value|out)/', name):
    return array
  first, *stack, last = array.shape
  return array.reshape((4, 8, last) if name.endswith('out/kernel')
                       else (first, *stack, 4, 8))


def test_kernels_with_heads_apart(tmp_path):
  tensors = random_tensors()
  opened = open_t5x(str(write_t5x(tmp_path / 'checkpoint_1', {
      name: heads_apart(name, array) for name, array in tensors.items()})))
  assert_same(opened, tensors)
  assert opened.config.d_kv == 8


@pytest.mark.parametrize('name', [
    QUERY, 'encoder/encoder_norm/scale', TABLE, 'token_embedder/embedding'])
def test_parts_are_read(name, tmp_path):
  tensors = random_tensors()
  index = tuple(slice(1, n - 1, None) for n in tensors[name].shape)
  for i, arrays in enumerate((
      tensors, scanned(tensors, 'layers'),
      {key: heads_apart(key, array) for key, array in tensors.items()})):
    opened = open_t5x(str(write_t5x(tmp_path / str(i), arrays)))
    np.testing.assert_array_equal(
        opened.read(name, index), tensors[name][index])


def test_one_layer_of_many_chunks_is_read(tmp_path, monkeypatch):
  """Not the array of all layers."""
  arrays = {f'encoder/encoder/{i}/kernel': np.ones((8, 2, 8), np.float32)
            for i in 'ab'}
  arrays |= random_tensors()
  opened = open_t5x(str(write_t5x(tmp_path / 'c', arrays, inline=0)))
  for path in (tmp_path / 'c' / 'target.encoder.encoder.a.kernel').iterdir():
    if path.name.split('.')[1] == '1':
      path.unlink()  # The second layer's chunks.
  assert np.all(opened.read('encoder/layers_0/a/kernel') == 1)
  with pytest.raises(WeightsError, match='cannot read encoder/encoder/a'):
    opened.read('encoder/layers_1/a/kernel')


def test_tables_that_differ_by_layer(tmp_path):
  arrays = scanned(random_tensors(), None)
  arrays['encoder/encoder/relpos_bias/rel_embedding'][0, 1, 0] += 1
  folder = write_t5x(tmp_path / 'checkpoint_1', arrays)
  refuses(folder, re.escape(
      f'{folder}: encoder/layers_1/relpos_bias/rel_embedding differs from '
      'encoder/layers_0/relpos_bias/rel_embedding: LongT5 has one table for '
      f'all layers ({TABLE}).'))


def test_config_is_taken(tmp_path):
  config = LongT5Config(local_radius=31, encoder_attention_type='local',
                        **SIZES)
  opened = open_t5x(str(write_t5x(tmp_path / 'c', random_tensors(False))),
                    config)
  assert opened.config is config
  assert not any('config' in line for line in opened.report)


def test_relu_and_a_tied_head_are_derived(tmp_path):
  arrays = {name.replace('wi_0', 'wi'): array
            for name, array in random_tensors(False).items()
            if 'wi_1' not in name and 'logits' not in name}
  opened = open_t5x(str(write_t5x(tmp_path / 'c', arrays)))
  assert opened.config == LongT5Config(
      encoder_attention_type='local', **SIZES | dict(
          feed_forward_proj='relu', tie_word_embeddings=True))
  assert opened.config.scale_decoder_outputs  # As T5X scales a tied head's.


def test_newest_of_several_steps(tmp_path):
  tensors = random_tensors()
  for step in (900, 1000, 20):
    write_t5x(tmp_path / f'checkpoint_{step}',
              {name: array + step for name, array in tensors.items()})
  (tmp_path / 'checkpoint_2000.tmp-1').mkdir()
  opened = open_t5x(str(tmp_path))
  assert_same(opened, {name: array + 1000 for name, array in tensors.items()})
  assert opened.report[0] == (
      f'{tmp_path}/checkpoint_1000, the newest of 3.')


def test_bfloat16(tmp_path):
  tensors = {name: array.astype(jnp.bfloat16)
             for name, array in random_tensors().items()}
  assert_same(open_t5x(str(write_t5x(tmp_path / 'c', tensors))), tensors)


def test_bfloat16_as_integers_of_version_2(tmp_path):
  arrays = random_tensors() | {QUERY: np.ones((32, 32), np.uint16)}
  opened = open_t5x(str(write_t5x(tmp_path / 'c', arrays, version=2)))
  with pytest.raises(WeightsError, match=f'{QUERY} is of type uint16'):
    check_tensors(opened, flax.traverse_util.unflatten_dict(
        random_tensors(), sep='/'))


def cut(path, size):
  path.write_bytes(path.read_bytes()[:size])


def change_index(folder, change):
  """Rewrites the index with `change(target)`."""
  path = folder / 'checkpoint'
  index = flax.serialization.msgpack_restore(path.read_bytes())
  change(index['optimizer']['target'])
  path.write_bytes(flax.serialization.msgpack_serialize(index))


def query_of(target):
  return target['encoder']['layers_0']['attention']['query']


CHUNK = 'target.encoder.layers_0.attention.query.kernel/0.1'
DAMAGES = {
    'cut index': (
        lambda folder: cut(folder / 'checkpoint', 5000),
        r'{}/checkpoint: cut short, or no msgpack file \(\w+\)\.'),
    'empty index': (
        lambda folder: cut(folder / 'checkpoint', 0),
        r'{}/checkpoint: cut short, or no msgpack file \(\w+\)\.'),
    'index of something else': (
        lambda folder: (folder / 'checkpoint').write_bytes(b'\x01'),
        r'{}/checkpoint: version=None must be one of \(2, 3\)\.'),
    'old version': (
        lambda folder: write_t5x(folder, {}, version=1),
        r'{}/checkpoint: version=1 must be one of \(2, 3\)\.'),
    'no parameters': (
        lambda folder: (folder / 'checkpoint').write_bytes(
            flax.serialization.msgpack_serialize(
                {'version': 3, 'optimizer': {'state': {}}})),
        r'{}/checkpoint: it holds no optimizer/target\.'),
    'no T5': (
        lambda folder: write_t5x(folder, {'dense/kernel': np.ones((2, 2))}),
        r'{}: no T5: it holds no token_embedder/embedding\.'),
    'no index': (
        lambda folder: (folder / 'checkpoint').unlink(),
        r'{}: no T5X checkpoint: it holds neither a file checkpoint nor a '
        r'folder checkpoint_STEP\.'),
    'cut chunk': (
        lambda folder: cut(folder / CHUNK, 100),
        rf'{{}}: cannot read {QUERY}: FAILED_PRECONDITION: Error reading .*'),
    'missing chunk': (
        lambda folder: (folder / CHUNK).unlink(),
        rf'{{}}: cannot read {QUERY}: NOT_FOUND: .* is missing\.'),
    'missing array': (
        lambda folder: shutil.rmtree((folder / CHUNK).parent),
        rf'{{}}: cannot read {QUERY}: NOT_FOUND: .* does not exist\.'),
    'index of another shape': (
        lambda folder: change_index(
            folder, lambda target: query_of(target)['kernel']['metadata']
            .update(shape=[32, 16])),
        rf'{{}}: cannot read {QUERY}: its array has shape \(32, 32\), not '
        r'\(32, 16\) as the index says\.'),
    'another driver': (
        lambda folder: change_index(
            folder, lambda target: query_of(target)['kernel'].update(
                driver='n5')),
        rf"{{}}: {QUERY} has a spec of driver='n5', path='target.*/'; a zarr "
        r'array is needed\.'),
    'placeholder': (
        lambda folder: change_index(
            folder, lambda target: query_of(target).update(
                kernel='PLACEHOLDER://x')),
        rf'{{}}: {QUERY} is of type str, neither an array nor a tensorstore '
        r'spec\.'),
}


@pytest.mark.parametrize('name', DAMAGES)
def test_damage_is_one_line(name, tmp_path):
  folder = write_t5x(tmp_path / 'c', random_tensors())
  damage, message = DAMAGES[name]
  damage(folder)
  refuses(folder, message.format(re.escape(str(folder))))


def test_no_folder(tmp_path):
  refuses(tmp_path / 'no', re.escape(f'{tmp_path}/no: no such folder.'))
