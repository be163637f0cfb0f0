"""What is installed: the wheel, and messages where an extra is missing."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

import experiments
import powerprop_jax

_EXPERIMENTS = pathlib.Path(experiments.__file__).parent
_ROOT = pathlib.Path(powerprop_jax.__file__).parents[1]
# As they are imported; jmp comes with Haiku, SciPy with JAX.
_EXTRA = (
  *('array_record', 'flatbuffers', 'grain', 'matplotlib', 'cv2', 'orbax'),
  *('importlib_resources', 'rich', 'safetensors', 'sklearn'),
  *('tensorflow_datasets', 'tyro'),
)
_INSTALL = "pip install 'powerprop_jax[train]'"

# Runs before the program, as where the packages are not installed.
_BLOCKER = """
import sys

class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in {packages!r}:
      raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Blocker())
"""


def without(tmp_path, packages, *args):
  """Runs Python with packages that cannot be imported."""
  (tmp_path / 'sitecustomize.py').write_text(_BLOCKER.format(packages=packages))
  paths = [str(tmp_path), str(_ROOT)]
  return subprocess.run(
    [sys.executable, *args],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env={'PYTHONPATH': ':'.join(paths), 'JAX_PLATFORMS': 'cpu'},
  )


def refusal(done):
  """The one line of a program that does not start."""
  assert done.returncode == 2, done.stderr
  assert done.stdout == ''
  (line,) = done.stderr.splitlines()
  assert line.startswith('error: ') and line.endswith(_INSTALL), line
  return line


def _entry_point():
  """What the console script does."""
  text = (_ROOT / 'pyproject.toml').read_text()
  module, _, name = tomllib.loads(text)['project']['scripts'][
    'powerprop'
  ].partition(':')
  return f'import sys; from {module} import {name}; sys.exit({name}())'


def _programs():
  """The modules of experiments that are programs."""
  return [
    '.'.join(('experiments', *path.relative_to(_EXPERIMENTS).parts))[:-3]
    for path in sorted(_EXPERIMENTS.rglob('*.py'))
    if "if __name__ == '__main__':" in path.read_text()
  ]


def test_powerprop_says_what_to_install(tmp_path):
  line = refusal(without(tmp_path, _EXTRA, '-c', _entry_point(), 'train'))
  assert 'tyro' in line
  refusal(without(tmp_path, ('tyro',), '-m', 'powerprop_jax.train', '--help'))


@pytest.mark.parametrize(
  'name', ['one_shot_pruning', 'benchmarks.psi', 'launch']
)
@pytest.mark.slow
def test_programs_say_what_to_install(tmp_path, name):
  done = without(tmp_path, _EXTRA, '-m', f'experiments.{name}', '--help')
  assert 'matplotlib' in refusal(done)


def test_figures_say_what_to_install(tmp_path):
  code = 'import powerprop_jax.report.plotting'
  done = without(tmp_path, ('matplotlib',), '-c', code)
  assert done.stderr.splitlines()[-1].startswith('ImportError: matplotlib is')
  assert done.stderr.strip().endswith(_INSTALL)


@pytest.mark.slow
def test_all_that_programs_import_is_asked_for(tmp_path):
  # Whatever else the extra has may be missing: it is needed for one thing only.
  asked = refusal(without(tmp_path, _EXTRA, '-m', 'experiments.flops_table'))
  others = [p for p in _EXTRA if p not in asked]
  assert len(others) < len(_EXTRA) - 3
  modules = ['powerprop_jax.train.cli.main', *_programs()]
  assert 'experiments.sparse_training.__main__' in modules
  code = f'import {", ".join(modules)}'
  done = without(tmp_path, tuple(others), '-c', code)
  assert done.returncode == 0, done.stderr


def test_importing_a_program_is_left_to_who_imports_it(tmp_path):
  done = without(tmp_path, _EXTRA, '-c', 'import experiments')
  assert done.returncode == 0, done.stderr


def test_the_citation_is_of_this_version():
  lines = (_ROOT / 'CITATION.cff').read_text().splitlines()
  assert f'version: {powerprop_jax.__version__}' in lines


@pytest.mark.slow
def test_the_wheel_is_the_library_alone_and_works_in_an_empty_folder(tmp_path):
  pytest.importorskip('pip')
  if int(importlib.metadata.version('setuptools').split('.')[0]) < 77:
    pytest.skip('needs setuptools 77 or later: install the extra test')
  source, wheels, site, empty = (
    tmp_path / name for name in ('source', 'wheels', 'site', 'empty')
  )
  # A copy, because building leaves files behind.
  skipped = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info')
  shutil.copytree(_ROOT, source, ignore=skipped)
  empty.mkdir()
  pip = [sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check']
  build = [*pip, 'wheel', '--no-deps', '--no-build-isolation', '-w', wheels]
  subprocess.run([*build, source], check=True)

  (wheel,) = wheels.iterdir()
  found = set(zipfile.ZipFile(wheel).namelist())
  tops = {name.split('/')[0] for name in found}
  version = powerprop_jax.__version__
  assert tops == {'powerprop_jax', f'powerprop_jax-{version}.dist-info'}
  wanted = [
    path.relative_to(source).as_posix()
    for path in (source / 'powerprop_jax').rglob('*')
    if path.suffix in ('.py', '.cc', '.h', '.typed')
  ]
  assert found.issuperset(wanted)

  install = [*pip, 'install', '--no-deps', '--no-index', '--target', site]
  subprocess.run([*install, wheel], check=True)
  path = os.pathsep.join((str(site / 'bin'), os.environ['PATH']))
  env = {'PATH': path, 'PYTHONPATH': site, 'HOME': str(empty)}
  smoke = _ROOT / 'tests' / 'smoke.py'
  done = subprocess.run(
    [sys.executable, smoke], cwd=empty, env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == f'{site}/powerprop_jax: {version}\n'
