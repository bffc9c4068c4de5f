"""`import longt5_flax` needs neither TensorFlow, seqio nor Grain."""

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
LISTED = "{'tensorflow', 'seqio', 'grain'}"
# As on a machine where they are not installed.
HIDE = f"""
import sys

class Hidden:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in {LISTED}:
      raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Hidden())
"""
IMPORT = f"""
import sys
import longt5_flax
assert longt5_flax.LongT5Config().d_model == 512
print('loaded:', sorted({LISTED} & set(sys.modules)))
"""


def python(program: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
      [sys.executable, '-c', program], cwd=REPOSITORY, capture_output=True,
      text=True, check=False)


def test_import_loads_none_of_them():
  result = python(IMPORT)
  assert result.returncode == 0, result.stderr
  assert result.stdout == 'loaded: []\n'


def test_import_works_where_none_is_installed():
  result = python(HIDE + IMPORT)
  assert result.returncode == 0, result.stderr
  assert result.stdout == 'loaded: []\n'


def test_hidden_is_as_good_as_not_installed():
  """Both programs above can fail: grain is installed here."""
  result = python(HIDE + 'import grain')
  assert result.returncode == 1
  assert "ModuleNotFoundError: No module named 'grain'" in result.stderr
  result = python('import grain\n' + IMPORT)
  assert result.stdout == "loaded: ['grain']\n", result.stderr
