"""Writes a page that compares runs.

  python -m longt5_flax.report runs/base runs/large --output=report

reads metrics.jsonl, config.json and eval/ of each folder and writes
report/report.html, one file that needs neither network nor scripts, and its
figures as PNG.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from longt5_flax.config import ConfigError
from longt5_flax.interop.atomic import replace_file
from longt5_flax.report_figures import figures
from longt5_flax.report_page import page
from longt5_flax.report_runs import read_runs


def write_report(workdirs: Sequence[str], folder: str, samples: int
                 ) -> list[str]:
  """Compares runs.

  Args:
    workdirs: their folders.
    folder: to write to, made if needed; files of an earlier report are
      replaced.
    samples: how many examples to show.

  Returns:
    The paths of the files written, the page first.

  Raises:
    ConfigError: a folder is no run, `samples` is negative, or nothing can be
      written; nothing has been.
  """
  if samples < 0:
    raise ConfigError(f'--samples={samples} must be at least 0.')
  runs = read_runs(workdirs)
  drawn = figures(runs)
  text = page(runs, drawn, samples)
  paths = [os.path.join(folder, 'report.html')]
  try:
    os.makedirs(folder, exist_ok=True)
    for group in drawn.values():
      for figure in group:
        paths.append(os.path.join(folder, f'{figure.name}.png'))
        figure.save(paths[-1])
    replace_file(paths[0], text)
  except OSError as error:
    raise ConfigError(f'--output={folder}: {error.strerror}.') from None
  return paths


def make_parser() -> argparse.ArgumentParser:
  """Of the command line."""
  parser = argparse.ArgumentParser(
      prog='python -m longt5_flax.report', allow_abbrev=False,
      description='Writes a page that compares runs.')
  parser.add_argument('workdirs', nargs='+', metavar='WORKDIR',
                      help="a run's folder")
  parser.add_argument('--output', default='report', metavar='DIR',
                      help='gets report.html and figures')
  parser.add_argument('--samples', type=int, default=5, metavar='N',
                      help='examples to show')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  options = make_parser().parse_args(argv)
  try:
    page_path, *figure_paths = write_report(
        options.workdirs, options.output, options.samples)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(f'Page: {page_path}\nFigures: {len(figure_paths)} PNG files beside it')
  return 0


if __name__ == '__main__':
  sys.exit(main())
