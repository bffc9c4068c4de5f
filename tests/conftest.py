"""What every test runs under.

JAX computes on 8 CPU devices, with `-m gpu` on a GPU, or where
LONGT5_TEST_PLATFORM says, with float32 matrix products in full precision.
Shapes and types of everything annotated in longt5_flax are checked: a test that
passes also proves the annotations.
"""

import importlib.util
import os
import sys
from pathlib import Path

import jax
import pytest
from jaxtyping import install_import_hook

_TESTS = Path(__file__).parent

# Before anything imports the package.
install_import_hook('longt5_flax', 'beartype.beartype')

# `import golden` from any folder of tests; `import longt5_flax` from the
# checkout, also where the package is not installed.
for path in (_TESTS, _TESTS.parent):
  if str(path) not in sys.path:
    sys.path.insert(0, str(path))


# Images of accelerators rarely have the extra `seqio`, which these import; the
# others run there.
if importlib.util.find_spec('seqio') is None:
  collect_ignore = ['test_train_seqio.py', 'data/test_paper_tasks.py',
                    'data/test_seqio_source.py', 'data/test_tasks.py']


def pytest_configure(config: pytest.Config) -> None:
  """By jax.config, not by the environment: commands that tests start as
  processes of their own see the machine as a user's shell does."""
  platform = os.environ.get(
      'LONGT5_TEST_PLATFORM',
      'cuda' if config.getoption('markexpr') == 'gpu' else 'cpu')
  jax.config.update('jax_platforms', platform)
  if platform == 'cpu':
    jax.config.update('jax_num_cpu_devices', 8)
  jax.config.update('jax_default_matmul_precision', 'highest')


@pytest.fixture(scope='session')
def testdata() -> Path:
  """The folder of small files that tests read."""
  return _TESTS / 'testdata'


@pytest.fixture(scope='module')
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Compiled programs of the processes that a file starts: each once."""
  return tmp_path_factory.mktemp('cache')
