"""Kept kernels: only ours and whole ones are loaded, and nothing is fatal."""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import types

import pytest

from powerprop_jax.sparse import native
from powerprop_jax.sparse.native import cache

# No user and no group of any machine, one hopes.
_NOBODY = 54321
_IS_ROOT = os.name == 'posix' and os.geteuid() == 0
_AS_NOBODY = f"""
os.setgroups([])
os.setgid({_NOBODY})
os.setuid({_NOBODY})
for name in ('HOME', 'XDG_CACHE_HOME'):
  os.environ.pop(name, None)
"""

# What a program sees that multiplies; it is told what to do first.
_PROGRAM = """
import json, os, sys, warnings
import jax.numpy as jnp
from powerprop_jax.sparse import index, linear, native

exec(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter('always')
  status = native.status()
index = index.from_positions([0, 3], (2, 2))
given = jnp.ones((1, 2)), jnp.array([2.0, 3.0]), index
y = linear.product(*given, 'native' if native.is_available() else 'loops')
refused = ''
try:
  linear.product(*given, 'native')
except ValueError as error:
  refused = str(error)
with open('/proc/self/maps') as file:
  maps = sorted({x.split()[5] for x in file if 'kernels' in x})
warned = [str(w.message) for w in caught]
print(json.dumps([status, warned, y.tolist(), maps, refused]))
"""

# Does what a compiler does, without the time: there is one real library.
_COMPILER = """#!/bin/sh
echo called >> {log}
{first}
while [ "$1" != -o ]; do shift; done
cp {library} "$2"
"""


@pytest.fixture(scope='session')
def library():
  """The kernels, compiled."""
  if not native.is_available():
    pytest.skip(f'no compiled kernels: {native.status()}')
  found = list(cache.folder().glob(native._name('*')))
  if not found:
    pytest.skip(f'kernels cannot be kept in {cache.folder()}')
  return found[0]


@pytest.fixture
def place(library):
  """A folder that any user may read, with the library in folder/kept."""
  # Others may not enter those of pytest.
  with tempfile.TemporaryDirectory() as name:
    place = pathlib.Path(name)
    place.chmod(0o755)
    shutil.copyfile(library, place / 'library')
    (place / 'kept').mkdir(mode=0o700)
    shutil.copy(library, place / 'kept')
    yield place


def _kept(place):
  (found,) = (place / 'kept').glob('kernels_*.so')
  return found


def _compiler(place, first=''):
  """Path of a compiler that runs these commands before it compiles."""
  compiler = place / 'c++'
  text = _COMPILER.format(
    log=place / 'log', library=place / 'library', first=first
  )
  compiler.write_bytes(text.encode('latin-1'))
  compiler.chmod(0o755)
  (place / 'log').touch()
  (place / 'log').chmod(0o666)
  return str(compiler)


def _num_compiled(place):
  return len((place / 'log').read_text().splitlines())


def _start(place, first='', *more, folder='kept', **environment):
  """Starts a program; variables that are '' are taken from it."""
  kept = {'POWERPROP_CACHE_DIR': folder and str(place / folder)}
  variables = {**os.environ, 'JAX_PLATFORMS': 'cpu', **kept, **environment}
  return subprocess.Popen(
    [sys.executable, '-c', _PROGRAM, first, *more],
    stdout=subprocess.PIPE,
    text=True,
    env={name: value for name, value in variables.items() if value},
  )


def _seen(process):
  """What it saw, once it has ended well and multiplied right."""
  output, _ = process.communicate(timeout=300)
  assert process.returncode == 0
  status, warned, y, maps, refused = json.loads(output)
  assert y == [[2.0, 3.0]]
  missing = f'there are no compiled kernels: {status}. Use other kernels'
  assert refused.startswith('' if status == 'available' else missing)
  return types.SimpleNamespace(status=status, warned=warned, maps=maps)


def _run(*args, **settings):
  return _seen(_start(*args, **settings))


def _needs_root():
  if not _IS_ROOT:
    pytest.skip('only root can act as another user')
  source = pathlib.Path(native.__file__).parent / 'common.h'
  for path in (source, *source.parents):
    if not path.stat().st_mode & (0o004 if path == source else 0o001):
      pytest.skip(f'other users cannot read {path}')


def test_a_kept_library_needs_no_compiler(place):
  seen = _run(place, CXX='', PATH='/none')
  assert seen.status == 'available' and not seen.warned
  assert seen.maps == [str(_kept(place))]


@pytest.mark.parametrize(
  ('environment', 'says', 'is_warned'),
  [
    (dict(CXX='no-c++'), 'no C++ compiler: no-c++ not found', True),
    (dict(POWERPROP_NATIVE='0'), '$POWERPROP_NATIVE turns them off', False),
  ],
)
def test_without_kernels_the_rest_works(place, environment, says, is_warned):
  seen = _run(place, folder='none', **environment)
  assert seen.status == says and len(seen.warned) == is_warned
  assert all(says in w and 'POWERPROP_NATIVE=0' in w for w in seen.warned)


@pytest.mark.parametrize(
  ('folder', 'says'),
  [
    ('', 'this user has no home'),
    ('kept', 'Permission denied'),
    ('library/x', 'Not a directory'),
  ],
  ids=['no home', 'read-only', 'no folder'],
)
@pytest.mark.slow
def test_where_nothing_can_be_kept_each_program_compiles(place, folder, says):
  kept, first = place / 'kept', ''
  if folder != 'library/x':
    _needs_root()  # Who may write everywhere, and has a home.
    _kept(place).unlink()
    kept.chmod(0o555)
    os.chown(kept, _NOBODY, _NOBODY)
    first = _AS_NOBODY
  seen = _run(place, first, folder=folder, CXX=_compiler(place))
  assert seen.status == 'available' and _num_compiled(place) == 1
  (warned,) = seen.warned
  assert says in warned and (folder != 'kept' or str(kept) in warned)
  assert folder == 'library/x' or not os.listdir(kept)


@pytest.mark.parametrize(
  'damage',
  [lambda x: x[: len(x) // 2], lambda x: b'', lambda x: x[:-1] + b'?', None],
  ids=['truncated', 'empty', 'changed', 'of another user'],
)
@pytest.mark.slow
def test_what_is_not_ours_and_whole_is_made_again(place, damage):
  path = _kept(place)
  whole, says = path.read_bytes(), f'{path} is damaged'
  if damage:
    path.write_bytes(damage(whole))
  else:
    _needs_root()
    os.chown(path, _NOBODY, _NOBODY)
    says = f'{path} belongs to user {_NOBODY}, not to 0'
  seen = _run(place, CXX=_compiler(place))
  assert seen.status == 'available' and _num_compiled(place) == 1
  (warned,) = seen.warned
  assert says in warned
  assert path.read_bytes() == whole and path.stat().st_uid == os.geteuid()
  assert os.listdir(path.parent) == [path.name]


@pytest.mark.slow
def test_libraries_of_two_compilers_lie_side_by_side(place):
  # Such as one for a newer C++ library than there is here.
  other = b'not for this machine'
  _kept(place).unlink()
  theirs = place / 'kept' / native._name(cache.digest(other))
  theirs.write_bytes(other)
  compiler = _compiler(place)
  for num_warned in (1, 0):
    seen = _run(place, CXX=compiler)
    assert seen.status == 'available' and len(seen.warned) == num_warned
  assert _num_compiled(place) == 1
  assert theirs.read_bytes() == other
  assert len(os.listdir(place / 'kept')) == 2


@pytest.mark.slow
def test_two_programs_may_compile_at_once(place):
  path = _kept(place)
  whole = path.read_bytes()
  path.unlink()
  # Neither goes on before the other is there.
  wait = f"""for i in $(seq 600); do
    [ $(wc -l < {place / 'log'}) -lt 2 ] && sleep 0.1
  done"""
  compiler = _compiler(place, wait)
  started = [_start(place, CXX=compiler) for _ in range(2)]
  for seen in map(_seen, started):
    assert seen.status == 'available' and not seen.warned
    assert seen.maps == [str(path)]
  assert _num_compiled(place) == 2
  assert path.read_bytes() == whole and os.listdir(path.parent) == [path.name]


@pytest.mark.slow
def test_what_others_may_have_written_is_not_loaded(place):
  folder, path = place / 'kept', _kept(place)
  folder.chmod(0o777)
  seen = _run(place, CXX=_compiler(place))
  assert seen.status == 'available' and _num_compiled(place) == 1
  (warned,) = seen.warned
  assert f'{folder} may be written by other users' in warned
  assert str(path) not in seen.maps and os.listdir(folder) == [path.name]

  seen = _run(place, CXX='no-such-c++')
  (warned,) = seen.warned
  assert seen.status in warned and not seen.maps
  assert f'{folder} may be written by other users' in seen.status
  assert seen.status.endswith('no C++ compiler: no-such-c++ not found')


class TrustTest:
  @pytest.fixture(autouse=True)
  def _file(self, tmp_path, monkeypatch):
    self.folder = tmp_path / 'kept'
    monkeypatch.setenv('POWERPROP_CACHE_DIR', str(self.folder))
    mask = os.umask(0)  # Nothing depends on it.
    try:
      self.path = cache.write('file', b'text')
    finally:
      os.umask(mask)

  def _refused(self, match):
    with pytest.raises(OSError, match=match):
      cache.read('file')

  def test_what_was_written_is_read(self):
    assert cache.read('file') == b'text'
    assert os.listdir(self.folder) == ['file']
    cache.write('file', b'other')
    assert cache.read('file') == b'other'

  @pytest.mark.parametrize('mode', [0o020, 0o002])
  def test_nobody_else_may_write(self, mode):
    for path, own in ((self.path, 0o600), (self.folder, 0o700)):
      path.chmod(own | mode)
      self._refused(f'{path} may be written by other users')
      path.chmod(own)
    assert cache.read('file') == b'text'

  def test_nobody_else_may_own_it(self):
    _needs_root()
    for path in (self.path, self.folder):
      os.chown(path, _NOBODY, -1)
      self._refused(f'{path} belongs to user {_NOBODY}')
      os.chown(path, 0, -1)
    os.chown(self.folder, _NOBODY, -1)
    with pytest.raises(PermissionError):
      cache.write('file', b'other')
    assert self.path.read_bytes() == b'text'

  def test_links_are_followed_to_the_folder_alone(self, tmp_path, monkeypatch):
    (tmp_path / 'link').symlink_to(self.folder)
    monkeypatch.setenv('POWERPROP_CACHE_DIR', str(tmp_path / 'link'))
    assert cache.folder() == self.folder
    assert cache.read('file') == b'text'
    self.path.rename(tmp_path / 'elsewhere')
    self.path.symlink_to(tmp_path / 'elsewhere')
    self._refused('no ordinary file')
    (tmp_path / 'elsewhere').unlink()
    self._refused('no ordinary file')

  def test_a_file_that_cannot_be_written_leaves_nothing(self):
    (self.folder / 'taken').mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:  # As on a full disk.
      with pytest.raises(OSError, match='too large'):
        cache.write('file', bytes(10_000))
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(OSError, match='taken'):
      cache.write('taken', b'text')
    assert sorted(os.listdir(self.folder)) == ['file', 'taken']
    assert cache.read('file') == b'text'

  def test_a_relative_folder_is_made_absolute(self, monkeypatch):
    monkeypatch.chdir(self.folder)
    monkeypatch.setenv('POWERPROP_CACHE_DIR', '.')
    assert cache.folder() == self.folder


@pytest.mark.parametrize(
  ('does', 'says'),
  [
    ('echo "error: out of ink" >&2; exit 1', 'error: out of ink'),
    ('kill -SEGV $$', 'ended with status -11'),
    ('printf "Fehler \\344\\n\\377" >&2; exit 1', 'Fehler \ufffd'),
    ('exec sleep 600', 'had not finished after 1 s'),
    ('echo > {place}/library', 'file too short'),
    ('cp {place}/library /dev/full || exit 1', 'No space left on device'),
  ],
  ids=['error', 'crash', 'not UTF-8', 'hang', 'no library', 'full disk'],
)
@pytest.mark.slow
def test_whatever_a_compiler_does_a_program_goes_on(place, does, says):
  _kept(place).unlink()
  compiler = _compiler(place, does.format(place=place))
  seen = _run(place, 'native._COMPILE_SECONDS = 1', CXX=compiler)
  assert says in seen.status
  (warned,) = seen.warned
  assert seen.status in warned and 'POWERPROP_NATIVE=0' in warned
  assert not os.listdir(place / 'kept') and not seen.maps
