"""Folders import only from folders to their left; light things stay light."""

import ast
import pathlib
import subprocess
import sys

import pytest

import powerprop_jax

_PACKAGE = pathlib.Path(powerprop_jax.__file__).parent
_FILES = sorted(_PACKAGE.rglob('*.py'))

# Folder -> the folders it may import from, itself aside.
_ALLOWED = {
  'core': set(),
  'files': set(),
  'optim': {'core'},
  'prune': {'core', 'optim', 'jaxprs'},
  'continual': {'core', 'optim'},
  'jaxprs': {'core'},
  'sparse': {'core', 'files', 'jaxprs'},
  'costs': {'core', 'files', 'jaxprs'},
  'nets': {'core', 'jaxprs', 'sparse'},
  'export': {'core', 'costs', 'files', 'optim', 'sparse'},
  'report': {'core', 'costs', 'files', 'optim', 'sparse'},
  'train': {
    *('core', 'files', 'optim', 'prune', 'continual', 'jaxprs', 'sparse'),
    *('costs', 'nets', 'export', 'report'),
  },
}

# Within core, files in the order in which they may build on each other; files
# of one rank do not import each other.
_CORE = (
  ('names', 'trees'),
  ('layouts', 'powers', 'counting'),
  ('reparam', 'select', 'topk', 'topk_columns'),
  ('masks', 'scores'),
  ('distributions', 'schedules'),
  ('patterns',),
  ('ranking',),
)
_CORE_RANKS = {name: rank for rank, names in enumerate(_CORE) for name in names}

# What only a training program needs, and who may import it.
_HEAVY = {
  *('tensorflow_datasets', 'sklearn', 'grain', 'orbax', 'matplotlib', 'tyro'),
  *('rich', 'tensorboardX', 'tensorflow', 'torch', 'wandb'),
}

each_file = pytest.mark.parametrize(
  'path', _FILES, ids=lambda p: str(p.relative_to(_PACKAGE))
)


def _imports(path):
  """What every import in a file names, lazy ones included."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        yield f'{node.module}.{alias.name}'


def _folder(path):
  return path.relative_to(_PACKAGE).parts[0]


@each_file
def test_imports_point_left(path):
  folder = _folder(path)
  for module in _imports(path):
    parts = module.split('.')
    if parts[0] == 'experiments':
      raise AssertionError(f'{path} imports {module}: the library stands alone')
    if parts[0] != 'powerprop_jax' or folder == '__init__.py':
      continue
    source = parts[1]
    assert source == folder or source in _ALLOWED[folder], (
      f'{path} imports {module}: {folder} may import from '
      f'{sorted(_ALLOWED[folder])} only'
    )
    if folder == source == 'core' and path.stem in _CORE_RANKS:
      name = next((part for part in parts[2:] if part in _CORE_RANKS), None)
      below, above = _CORE_RANKS.get(name), _CORE_RANKS[path.stem]
      assert below is None or below < above or name == path.stem, (
        f'core/{path.name} imports {name}, which is not below it'
      )


@each_file
def test_heavy_imports_stay_in_train_and_plotting(path):
  heavy = {module.split('.')[0] for module in _imports(path)} & _HEAVY
  where = path.relative_to(_PACKAGE).as_posix()
  if where.startswith('report/plotting/'):
    assert heavy <= {'matplotlib'}
  elif not where.startswith('train/'):
    assert not heavy, f'{where} imports {heavy}'


@pytest.mark.parametrize(
  'folder', sorted(set(_ALLOWED) - {'costs', 'export', 'nets', 'train'})
)
def test_pure_functions_know_no_haiku(folder):
  for path in (_PACKAGE / folder).rglob('*.py'):
    assert not any(m.split('.')[0] == 'haiku' for m in _imports(path)), path


def test_importing_the_package_loads_nothing_heavy():
  # Haiku imports Flax, and all that comes with it, where it is installed.
  program = (
    'import sys, haiku, optax; known = set(sys.modules); '
    'import powerprop_jax; new = set(sys.modules) - known; '
    f'print([m for m in {sorted(_HEAVY)!r} if m in new])'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=True
  )
  assert done.stdout.strip() == '[]'
