"""benchmarks/: the lines of each command, at the smallest size, and what they
are made of."""

import argparse
import gzip
import importlib
import json
import sys
import textwrap
import time
import venv

import pytest

import tiny_runs
from benchmarks import (
    attention,
    compile_time,
    generate,
    hlo,
    loss_differences,
    processes,
    report,
    step_profile,
    timing,
    train_step,
)

# One layer of the smallest model.
SMALL = ['--override', 'model.num_layers=1', 'model.vocab_size=64']
STEP = ['--preset=tglobal-tiny', '--attention=chunked', '--case=64x2',
        '--targets=16', *SMALL]
SPREAD = {'steps', 'median_ms', 'p10_ms', 'p90_ms', 'peak_bytes'}


@pytest.fixture(scope='module', autouse=True)
def cheap(tmp_path_factory):
  with tiny_runs.cheap_compilation(tmp_path_factory.mktemp('cache')):
    yield


@pytest.fixture
def here(monkeypatch):
  """Measures in this process, and peers not at all: they need PyTorch."""
  def run_here(function, arguments, *rest, **options):
    module, name = function.split(':')
    result = {}
    for line in getattr(importlib.import_module(module), name)(
        **json.loads(json.dumps(arguments))):
      result |= line
    return result

  def run_peer(function, arguments, options):
    json.dumps(arguments)
    assert options.peer_timeout == 200
    return {'median_ms': 1e6, 'forward_backward_ms': 1e6, 'peak_bytes': None}

  monkeypatch.setattr(processes, 'run_alone', run_here)
  monkeypatch.setattr(processes, 'run_peer_alone', run_peer)


def lines_of(module, arguments, capsys):
  assert module.main(arguments) == 0
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_train_step(here, tmp_path, capsys):
  out = tmp_path / 'lines.jsonl'
  lines = lines_of(train_step, [
      *STEP, '--steps=2', '--seconds=0', f'--out={out}', '--peer', 'eager'],
                   capsys)
  assert [json.loads(line) for line in out.read_text().splitlines()] == lines
  environment, ours, peer = lines
  assert environment['measure'] == 'environment'
  assert ours.keys() >= SPREAD | {
      'preset', 'length', 'rows', 'targets', 'attention', 'remat', 'device',
      'scan_layers', 'optimizer', 'compile_seconds', 'planned_bytes',
      'planned_temporary_bytes', 'input_tokens_per_second', 'mfu', 'parameters'}
  assert ours['input_tokens_per_second'] == pytest.approx(
      2 * 64 / ours['median_ms'] * 1000, rel=1e-3)
  assert 0 < ours['loss'] < 10
  assert peer['implementation'] == 'transformers eager'
  assert peer['input_tokens_per_second'] == 0  # 128 in 1000 seconds.
  assert peer['speedup'] == pytest.approx(1e6 / ours['median_ms'], rel=1e-3)


@pytest.mark.parametrize('case, remat, scan_unroll', [
    ('131072x1', 'none', 0), ('1048576x1', 'offload', 1)])
def test_what_memory_allows(here, case, remat, scan_unroll):
  arguments = train_step.make_parser().parse_args(['--attention=reference'])
  [variant] = train_step.variants(arguments, case)
  assert variant['line']['remat'] == remat
  assert variant['line']['scan_unroll'] == scan_unroll


def test_profile(here, tmp_path, capsys):
  [_, line] = lines_of(train_step, [
      *STEP, '--profile', str(tmp_path), '--profile_steps=2'], capsys)
  assert line['busy_ms'] > 0
  assert line['parts_ms'].keys() >= {
      'logits and loss', 'encoder attention', 'encoder MLP',
      'decoder cross-attention', 'optimizer and metrics'}
  assert sum(line['parts_ms'].values()) == pytest.approx(
      sum(line['kinds_ms'].values()), rel=0.01)
  name = 'tglobal-tiny-64-2-chunked-none'
  trace, program = f'{name}.trace.json.gz', f'{name}.hlo.txt.gz'
  assert {path.name for path in tmp_path.iterdir()} == {
      f'{name}.md', trace, program}
  # Next to nothing is left over; of kernels, as on a busy machine any may wait.
  module = hlo.parse_hlo(
      gzip.decompress((tmp_path / program).read_bytes()).decode())
  groups = step_profile.summarise(
      step_profile.read_trace(str(tmp_path / trace)), module, 2).groups
  unknown = sum(it.calls for it in groups if it.part == 'unknown')
  assert unknown < 0.06 * sum(it.calls for it in groups)


def test_generate(here, capsys):
  lines = lines_of(generate, [
      '--preset=tglobal-tiny', '--attention=chunked', '--case=64x2x2',
      '--new_tokens=4', '--steps=1', '--seconds=0', '--peer'], capsys)
  _, ours, peer = lines
  assert ours.keys() >= SPREAD | {
      'length', 'rows', 'beams', 'new_tokens', 'encode_ms', 'step_ms',
      'tokens_per_second'}
  assert ours['tokens_per_second'] == pytest.approx(
      8 / ours['median_ms'] * 1000, rel=1e-2)
  # Two layers of keys and values of 4 heads of 16: inputs, and half of the
  # tokens of both beams.
  decoder = ours['step_bytes'] - 2 * (64 + 2 * 2) * 2 * 2 * 4 * 16 * 2
  assert 32128 * 64 * 2 < decoder < 1.1 * 32128 * 64 * 2  # Mostly the head.
  assert peer['speedup'] > 1


def test_attention(here, monkeypatch, capsys):
  monkeypatch.setattr(attention.errors, '__defaults__', (256, 1))
  lines = lines_of(attention, [
      '--implementation', 'chunked', '--case=128x1', '--seconds=0', '--peer'],
                   capsys)
  _, errors, ours, peer = lines
  assert set(errors['errors']) == {
      'output', 'query', 'key', 'value', 'bias', 'side_key', 'side_value',
      'side_bias'}
  assert all(0 < error < 0.02 for error in errors['errors'].values())
  for name in ('forward', 'forward_backward'):
    assert (ours[f'{name}_p10_ms'] <= ours[f'{name}_ms']
            <= ours[f'{name}_p90_ms'])
  assert ours.keys() >= {'temporary_bytes', 'peak_bytes', 'mfu', 'device'}
  assert peer['speedup'] == pytest.approx(
      1e6 / ours['forward_backward_ms'], rel=0.01)


def test_compile_time(here, capsys):
  [_, line] = lines_of(compile_time, [
      *STEP, '--scan', 'false', '--repeats=2'], capsys)
  assert line['scan_layers'] is False
  assert line['repeats'] == 2
  assert line['cold_seconds'] >= line['trace_seconds'] > 0
  assert line['cold_range'][0] <= line['cold_seconds'] <= line['cold_range'][1]
  assert line['cached_range'][0] > 0


@pytest.mark.parametrize('module, arguments, complaint', [
    (train_step, ['--case=64'], '--case=64 must be LENGTHxROWS'),
    (train_step, ['--attention=fast'], "precision.attention='fast' must be"),
    (train_step, ['--override', 'optimizer.nam=x'], "no key 'nam'"),
    (attention, ['--case=x2'], '--case=x2 must be LENGTHxROWS'),
    (generate, ['--case=64x2x0'], '--case=64x2x0 must be LENGTHxROWS or'),
    (generate, ['--preset=huge'], "preset='huge' must be one of"),
    (compile_time, ['--remat=some'], "precision.remat='some' must be one of"),
    (report, ['/nowhere.jsonl'], '/nowhere.jsonl: '),
])
def test_bad_input(module, arguments, complaint, capsys):
  assert module.main(arguments) == 2
  out, error = capsys.readouterr()
  assert not out
  assert error.startswith(f'error: {complaint}')
  assert error.count('\n') == 1


CHILD = textwrap.dedent('''
    import os, subprocess, time

    def add(a, b):
      print('noise')
      os.system('echo more noise')
      yield {'a': a}
      yield {'sum': a + b}

    def fail(text):
      yield {'before': 1}
      raise RuntimeError(text)

    def wait():
      child = subprocess.Popen(['sleep', '60'])
      yield {'child': child.pid}
      time.sleep(60)
''')


def test_run_alone(tmp_path):
  (tmp_path / 'measured.py').write_text(CHILD)

  def run(function, timeout=30.0, **arguments):
    return processes.run_alone(
        f'measured:{function}', arguments, timeout,
        environment={'PYTHONPATH': str(tmp_path)})

  assert run('add', a=1, b=2) == {'a': 1, 'sum': 3}
  line = run('fail', text='CUDA out of memory. Tried')
  assert line['error'] == 'out of memory'
  line = run('fail', text='other\n\nFor more, see there.')
  assert line.pop('stderr').startswith('Traceback')
  assert line == {'before': 1, 'error': 'exit code 1: RuntimeError: other'}
  line = run('wait', timeout=1.0)
  assert line['error'] == 'more than 1 s'
  for _ in range(100):  # Its own children end with it.
    if not is_running(line['child']):
      break
    time.sleep(0.02)
  assert not is_running(line['child'])


def test_run_peer_alone(tmp_path, monkeypatch):
  """Packages meant for us stay out of a peer's way."""
  venv.create(tmp_path / 'peer', symlinks=True)
  [packages] = tmp_path.glob('peer/lib/python*/site-packages')
  (packages / 'measured.py').write_text(CHILD)
  ours = tmp_path / 'ours'
  ours.mkdir()
  for name in ('measured', 'tempfile'):
    (ours / f'{name}.py').write_text('raise ImportError("ours")')
  monkeypatch.setenv('PYTHONPATH', f'{ours}:.')
  monkeypatch.chdir(ours)

  def run(function, *options, **arguments):
    parser = argparse.ArgumentParser()
    processes.add_peer_options(parser)
    return processes.run_peer_alone(
        f'measured:{function}', arguments, parser.parse_args(
            ['--peer_python=../peer/bin/python', *options]))

  assert run('add', a=1, b=2) == {'a': 1, 'sum': 3}
  assert run('wait', '--peer_timeout=1')['error'] == 'more than 1 s'
  line = processes.run_peer_alone('measured:add', {}, argparse.Namespace(
      peer_python=sys.executable, peer_timeout=30))
  assert line['error'] == (
      "exit code 1: ModuleNotFoundError: No module named 'measured'")
  with pytest.raises(SystemExit):
    run('add', '--peer_python=./python')


def is_running(pid):
  try:
    with open(f'/proc/{pid}/stat') as file:
      return file.read().rpartition(')')[2].split()[0] != 'Z'
  except FileNotFoundError:
    return False


@pytest.mark.parametrize('limits, expected', [
    (timing.Limits(1, 3, 0.0, 60.0), 3),  # So many calls
    (timing.Limits(1, 3, 5.0, 60.0), 5),  # and so many seconds,
    (timing.Limits(1, 30, 5.0, 7.0), 7),  # unless it takes too long,
    (timing.Limits(1, 30, 5.0, 0.5), 1),  # but one at least.
])
@pytest.mark.parametrize('ahead', [True, False])
def test_time_calls(limits, expected, ahead, monkeypatch):
  clock, log = [0.0], []
  monkeypatch.setattr(time, 'perf_counter', lambda: clock[0])

  def call():
    log.append('call')
    return len(log)

  def wait(_):
    log.append('wait')
    clock[0] += 1.0

  assert timing.time_calls(call, wait, limits, ahead) == [1.0] * expected
  assert log.count('call') == log.count('wait') == expected + 1 + ahead
  start = ['call', 'wait', 'call', 'call', 'wait'] if ahead else [
      'call', 'wait', 'call', 'wait']
  assert log[:len(start)] == start


def test_spread():
  found = timing.spread([i / 1000 for i in range(1, 102)])
  assert found == {
      'steps': 101, 'median_ms': 51.0, 'p10_ms': 11.0, 'p90_ms': 91.0}
  assert timing.spread([0.002])['p90_ms'] == 2.0


# A layer forward and backward, and a parameter's update: what XLA writes.
HLO = '''\
HloModule jit_train_step

%fused_mlp (p0: bf16[8,4]) -> bf16[8,16] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = bf16[4,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[8,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, \
rhs_contracting_dims={0}, metadata={op_name="jit(train_step)/jvp(M)/M.encode/\
encoder/layers_0/mlp/wi_0/dot_general" stack_frame_id=1}
}

%fused_norm (p2: f32[8,4]) -> f32[8,4] {
  %p2 = f32[8,4]{1,0} parameter(0)
  %mul.7 = f32[8,4]{1,0} multiply(%p2, %p2), metadata={op_name="jit(train_step)\
/transpose(jvp(M))/M.decode/decoder/layers_1/pre_mlp_layer_norm/mul"}
  ROOT %add.7 = f32[8,4]{1,0} add(%mul.7, %p2), metadata={op_name="jit(\
train_step)/transpose(jvp(M))/M.decode/decoder/layers_1/mlp/add"}
}

ENTRY %main (a: bf16[8,4], b: bf16[4,16], c: f32[8,4]) -> f32[8,4] {
  %a = bf16[8,4]{1,0} parameter(0), metadata={op_name="batch"}
  %b = bf16[4,16]{1,0} parameter(1)
  %c = f32[8,4]{1,0} parameter(2)
  %fusion.1 = bf16[8,16]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_mlp
  %attend.2 = (bf16[8,16]{1,0}, f32[8]{0}) custom-call(%fusion.1), \
custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(train_step)/\
jvp(M)/M.encode/encoder/layers_0/attention/longt5_attention_forward"}
  %gemm.3 = (bf16[8,4]{1,0}, s8[64]{0}) custom-call(%fusion.1, %b), \
custom_call_target="__cublas$gemm", metadata={op_name="jit(train_step)/\
transpose(jvp(M))/checkpoint/rematted_computation/M.encode/encoder/layers_3/mlp\
/wo/dot_general"}, backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],\
"rhs_contracting_dimensions":["1"]}}}
  %copy.4 = f32[8,4]{0,1} copy(%c)
  %norm_fusion.5 = f32[8,4]{1,0} fusion(%copy.4), kind=kLoop, \
calls=%fused_norm, metadata={op_name="jit(train_step)/transpose(jvp(M))/\
M.decode/decoder/layers_1/pre_mlp_layer_norm/mul"}
  ROOT %add.6 = f32[8,4]{1,0} add(%norm_fusion.5, %c), metadata={op_name="jit(\
train_step)/add"}
}
'''


def trace_file(folder, kernels, streams=('Stream #1(Compute)', 'XLA Ops')):
  """What jax.profiler writes of a GPU: the same kernels on two lines."""
  events = [{'ph': 'M', 'name': 'process_name', 'pid': 1,
             'args': {'name': '/device:GPU:0'}},
            {'ph': 'M', 'name': 'process_name', 'pid': 2,
             'args': {'name': '/host:CPU'}}]
  for tid, stream in enumerate(streams):
    events.append({'ph': 'M', 'name': 'thread_name', 'pid': 1, 'tid': tid,
                   'args': {'name': stream}})
    events += [{'ph': 'X', 'pid': 1, 'tid': tid, 'ts': start, 'dur': duration,
                'name': name, 'args': {'hlo_op': op} if op else {}}
               for name, op, start, duration in kernels]
  events.append({'ph': 'X', 'pid': 2, 'tid': 0, 'ts': 0, 'dur': 9999,
                 'name': 'PjitFunction', 'args': {'hlo_op': 'add.6'}})
  path = folder / 'step.trace.json.gz'
  with gzip.open(path, 'wt') as file:
    json.dump({'traceEvents': events}, file)
  return str(path)


KERNELS = [  # name, instruction, start and duration in microseconds
    ('gemm_fusion_dot_1', 'fusion.1', 0, 1000),
    ('longt5_attention_forward', 'attend.2', 1000, 4000),
    ('nvjet_hsh_128x64', 'gemm.3', 5000, 2000),
    ('MemcpyD2D', 'copy.4', 7000, 500),
    ('norm_fusion_5', '', 8000, 600),  # By its name; after a gap,
    ('loop_add_fusion', 'add.6', 8100, 300),  # and beside another one.
    ('stray', '', 9000, 1000),
]


@pytest.fixture
def summary(tmp_path):
  path = trace_file(tmp_path, KERNELS)
  return step_profile.summarise(
      step_profile.read_trace(path), hlo.parse_hlo(HLO), 1)


def test_profile_of_a_gpu_trace(summary):
  found = [(it.ms, it.kind, it.part, it.direction) for it in summary.groups]
  assert found == [
      (4.0, 'attention kernels', 'encoder attention', 'forward'),
      (2.0, 'matrix products', 'encoder MLP', 'recompute'),
      (1.0, 'other fusions', 'not in the program', ''),
      (1.0, 'matrix products', 'encoder MLP', 'forward'),
      (0.6, 'other fusions', 'decoder norms', 'backward'),
      # Of no line of Python: it counts where it is read.
      (0.5, 'copies and transposes', 'decoder norms', 'backward'),
      (0.3, 'other fusions', 'optimizer and metrics', 'update'),
  ]
  assert summary.wall == pytest.approx(10.0)
  assert summary.busy == pytest.approx(9.1)


def test_sizes_of_kernels():
  module = hlo.parse_hlo(HLO)
  instructions = module.instructions
  assert hlo.flops_of(instructions['fusion.1'], module) == (
      2 * 8 * 4 * 16)
  assert hlo.flops_of(instructions['gemm.3'], module) == (
      2 * 8 * 4 * 16)
  assert hlo.bytes_of(instructions['attend.2'], module) == (
      2 * 8 * 16 + 4 * 8 + 2 * 8 * 16)


def test_layers_are_one_group(tmp_path):
  """Runs of one kernel in all layers and steps are added."""
  product = HLO[HLO.index('  %gemm.3'):HLO.index('  %copy.4')]
  other = product.replace('gemm.3', 'gemm.8').replace('layers_3', 'layers_0')
  text = HLO.replace('  %copy.4', f'{other}  %copy.4')
  path = trace_file(tmp_path, [
      ('nvjet_hsh_128x64', 'gemm.3', 0, 2000),
      ('nvjet_hsh_128x64', 'gemm.8', 3000, 1000)])
  [group] = step_profile.summarise(
      step_profile.read_trace(path), hlo.parse_hlo(text), 2).groups
  assert (group.ms, group.calls) == (1.5, 1.0)


def test_tables(summary):
  text = step_profile.tables(summary, 'a step')
  assert '| encoder MLP | 1.00 | 2.00 |  |  | 3.00 | 31.9% |' in text
  assert '| all | 5.00 | 2.00 | 1.10 | 0.30 | 9.40 |  |' in text
  assert 'decoder MLP |' in text  # Fused into the norm.


def test_trace_without_kernels(tmp_path):
  path = trace_file(tmp_path, KERNELS, ('XLA Ops',))
  with pytest.raises(ValueError, match=r"holds no kernels, only \['XLA Ops'\]"):
    step_profile.read_trace(path)


def step_line(length, implementation='longt5_flax', **values):
  return {'benchmark': 'train_step', 'implementation': implementation,
          'preset': 'tglobal-base', 'length': length, 'rows': 1,
          'attention': 'fused'} | values


def test_report(tmp_path, capsys):
  times = {'median_ms': 50.0, 'p10_ms': 49.0, 'p90_ms': 52.5,
           'peak_bytes': 7e9, 'input_tokens_per_second': 327680}
  lines = [
      {'benchmark': 'train_step', 'measure': 'environment'},
      step_line(16384, **times | {'median_ms': 99.0}),
      step_line(16384, **times, mfu=0.27, floor_ms=16.8),  # Counts.
      step_line(16384, 'transformers eager', **times, busy_ms=40.0),
      step_line(131072, 'transformers eager', error='out of memory'),
      {'benchmark': 'compile_time', 'preset': 'tglobal-large', 'length': 16384,
       'rows': 1, 'scan_layers': True, 'override': [], 'cold_seconds': 20.0,
       'cached_seconds': 3.0, 'trace_seconds': 2.0},
      {'benchmark': 'compile_time', 'preset': 'tglobal-xl', 'length': 16384,
       'rows': 1, 'scan_layers': False, 'override': ['a=1'],
       'error': 'more than 300 s'},
      {'benchmark': 'attention', 'implementation': 'fused', 'length': 16384,
       'rows': 2, 'forward_ms': 0.5, 'forward_p10_ms': 0.49,
       'forward_p90_ms': 0.625, 'temporary_bytes': 2**26,
       'error': 'out of memory'},
      step_line(16384, measure='profile', busy_ms=9.4,
                parts_ms={'encoder MLP': 7.05, 'embedding': 2.35}),
  ]
  path = tmp_path / 'lines.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)))
  assert report.main([str(path), '--images', str(tmp_path / 'images')]) == 0
  out = capsys.readouterr().out
  assert out.count('16384 x 1 | longt5_flax fused | 50.0 (49.0 to 52.5) |  | '
                   '327,680 | 7.0 GB | 27.0% |') == 1
  assert ('16384 x 1 | transformers eager | 50.0 (49.0 to 52.5) | 40.0 | '
          '327,680 |') in out
  assert '99.0' not in out
  assert '131072 x 1 | transformers eager | out of memory |' in out
  assert '| 16384 x 1 | stacked | 20.0 | 3.0 | 2.0 |' in out
  assert '| 16384 x 1 | apart, a=1 | more than 300 s |  |  |' in out
  assert ('| fused | 16384 x 2 | 0.500 (0.490 to 0.625) | out of memory | '
          '64 MiB |') in out
  assert '| encoder MLP | 7.05 | 75.0% |' in out
  image = tmp_path / 'images' / 'train_step_tglobal-base.png'
  assert image.read_bytes().startswith(b'\x89PNG')
  assert f'({image})' in out


def test_memory_is_that_of_the_longest_rows():
  lines = [step_line(length, rows=rows, peak_bytes=size) for length, rows, size
           in [(4096, 8, 9e9), (32768, 1, 8e9), (16384, 2, 7e9),
               (16384, 1, 5e9), (65536, 1, None)]]
  assert report.memory_by_tokens(lines) == ([16384, 32768], [5, 8])


@pytest.mark.parametrize('text', ['{', '[]', '{"a": 1}'])
def test_report_refuses(text, tmp_path, capsys):
  path = tmp_path / 'lines.jsonl'
  path.write_text('{"benchmark": "a"}\n' + text)
  assert report.main([str(path)]) == 2
  assert capsys.readouterr().err.startswith(f'error: {path}, line 2: must be')


def write_losses(folder, losses):
  folder.mkdir()
  lines = [{'step': step, 'split': 'train', 'loss': loss}
           for step, loss in enumerate(losses, start=1)]
  lines.append({'step': 1, 'split': 'validation', 'loss': 9.0})
  (folder / 'metrics.jsonl').write_text(
      ''.join(json.dumps(line) + '\n' for line in lines))
  return str(folder)


def test_loss_differences(tmp_path, capsys):
  """Of the steps that all runs have; the second run is the measure."""
  folders = [write_losses(tmp_path / name, losses) for name, losses in [
      ('reference', [5.0, 4.0, 3.0]), ('other-order', [5.01, 3.99, 3.0, 2.0]),
      ('fused', [5.0, 4.08, 3.0])]]
  figure = tmp_path / 'figure.png'
  assert loss_differences.main([*folders, f'--output={figure}']) == 0
  other, fused = map(json.loads, capsys.readouterr().out.splitlines())
  assert (other['run'], other['against'], other['steps']) == (
      'other-order', 'reference', 3)
  assert other['mean_absolute'] == pytest.approx(0.02 / 3)
  assert other['over_noise'] == 1
  assert fused['over_noise'] == pytest.approx(4)
  assert fused['largest'] == pytest.approx(0.08)
  assert figure.read_bytes().startswith(b'\x89PNG')


def test_loss_differences_of_what_is_no_run(tmp_path, capsys):
  folder = write_losses(tmp_path / 'a', [1.0])
  assert loss_differences.main([folder, str(tmp_path)]) == 2
  assert 'metrics.jsonl is missing' in capsys.readouterr().err
  other = write_losses(tmp_path / 'b', [])
  assert loss_differences.main([folder, other]) == 2
  assert 'no logged step in common' in capsys.readouterr().err
