"""Compiled kernels for a CPU, built on the machine that runs them.

The source (*.cc) comes with the package. The first program that
wants a kernel compiles it with the C++ compiler of the machine, for its very
processor, which takes a few seconds, and keeps the library for the next ones:
cache.py says where, and whose files it trusts. Whatever goes wrong, everything
else works as before, slower; one warning and `status` say why.

A library is kept as kernels_KEY_SUM.so. It fits where KEY does, a digest of the
source, the flags, jaxlib and the processor. SUM is one of its contents: a
damaged library is not loaded, and those of two compilers lie side by side.
A library that fits is used whichever compiler made it, also without one. Where
none can be kept, a program builds its own in a private temporary folder.

$CXX names another compiler; $POWERPROP_NATIVE=0 turns the kernels off.
"""

from collections.abc import Callable
import ctypes
import functools
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import tempfile
from typing import Any
import warnings

import jax
import jaxlib

from powerprop_jax.sparse.native import cache

_SOURCES = ('matmul.cc', 'images.cc', 'pixels.cc')
_HEADERS = ('common.h', 'tiles.h', 'window.h')
# Sums in any order, so that they can be vectors. Infinities and NaN stay exact.
_FLAGS = (
  '-O3',
  '-march=native',
  '-std=c++17',
  '-shared',
  '-fPIC',
  '-pthread',
  '-fassociative-math',
  '-fno-signed-zeros',
  '-fno-trapping-math',
  '-fno-math-errno',
)
_COMPILE_SECONDS = 300

# Names of the functions in JAX programs, and in the library in camel case.
_FUNCTIONS = (
  'powerprop_pack',
  'powerprop_multiply',
  'powerprop_dot',
  'powerprop_index',
  'powerprop_images_pack',
  'powerprop_images_convolve',
  'powerprop_images_to_input',
  'powerprop_images_to_values',
  'powerprop_pixels_convolve',
)


def is_available() -> bool:
  """Whether compiled kernels can be used; compiles them at the first call."""
  return _load() == ''


def status() -> str:
  """'available', or why there are no compiled kernels."""
  return _load() or 'available'


def call(name: str, results: Any) -> Callable[..., Any]:
  """One of _FUNCTIONS inside of a JAX program; results are shapes."""
  if not is_available():
    raise ValueError(
      f'there are no compiled kernels: {status()}. Use other kernels '
      "(kernel_choice.use('loops', 'dense'))."
    )
  return jax.ffi.ffi_call(name, results, vmap_method='sequential')


@functools.cache
def machine() -> str:
  """The processor and what it can do, in a few characters."""
  # Not platform.processor(), whose answer depends on $PATH.
  described = [platform.machine(), str(os.cpu_count())]
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text(errors='replace')
  except OSError:
    text = ''
  for start in ('model name', 'flags', 'Features'):
    described += [x for x in text.splitlines() if x.startswith(start)][:1]
  return cache.digest('\n'.join(described).encode())


@functools.cache
def source() -> bytes:
  """Source of the kernels, headers and all."""
  here = pathlib.Path(__file__).parent
  return b''.join((here / name).read_bytes() for name in _SOURCES + _HEADERS)


@functools.cache
def _load() -> str:
  """Registers the kernels; '' or why that cannot be done."""
  if os.environ.get('POWERPROP_NATIVE', '1') in ('0', 'off', 'false'):
    return '$POWERPROP_NATIVE turns them off'
  problems: list[str] = []
  failed = False
  try:
    _register_kept_or_made(problems)
  except Exception as error:  # Whatever it is, a program can do without.
    failed = True
    problems.append(str(error) or repr(error))
  reason = '; '.join(dict.fromkeys(problems))
  if failed:
    says = (
      f'sparse layers run without compiled kernels, slower: {reason}. Install '
      'a C++ compiler, or name one in $CXX and a folder of your own in '
      '$POWERPROP_CACHE_DIR, or set POWERPROP_NATIVE=0 to do without silently.'
    )
  else:
    says = (
      f'kernels of sparse layers had to be compiled anew: {reason}. If that '
      'comes again, name a folder of your own in $POWERPROP_CACHE_DIR.'
    )
  if problems:
    warnings.warn(says, RuntimeWarning, stacklevel=2)
  return reason if failed else ''


def _register_kept_or_made(problems: list[str]) -> None:
  """Loads a library; adds to problems why one had to be made."""
  try:
    kept = sorted(cache.folder().glob(_name('*')))
  except OSError:  # There is no folder; writing one says why.
    kept = []
  for path in kept:
    try:
      if path.name != _name(cache.digest(cache.read(path.name))):
        raise OSError(f'{path} is damaged')
      _register(path)
    except (OSError, AttributeError) as error:
      problems.append(str(error))
    else:
      problems.clear()  # They were about others.
      return
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as private:
    path = pathlib.Path(private) / 'kernels.so'
    _compile(path)
    data = path.read_bytes()
    try:
      path = cache.write(_name(cache.digest(data)), data)
    except OSError as error:
      problems.append(str(error))
    try:
      _register(path)
    except (OSError, AttributeError):
      path.unlink()  # The compiler made something else.
      raise


def _register(path: pathlib.Path) -> None:
  library = ctypes.CDLL(str(path))
  for name in _FUNCTIONS:
    function = getattr(library, name.title().replace('_', ''))
    jax.ffi.register_ffi_target(
      name, jax.ffi.pycapsule(function), platform='cpu'
    )


def _name(sum_of_contents: str) -> str:
  """Of a library that fits; see the top of this file."""
  made_for = repr((_FLAGS, jaxlib.__version__, machine()))
  key = cache.digest(source(), made_for.encode())
  return f'kernels_{key}_{sum_of_contents}.so'


def _compile(path: pathlib.Path) -> None:
  here = pathlib.Path(__file__).parent
  sources = [str(here / name) for name in _SOURCES]
  compiler = _compiler()
  include = ('-I', jax.ffi.include_dir())
  # Not a pipe: a compiler that is killed may leave children that hold it open.
  with path.with_suffix('.log').open('w+', errors='replace') as log:
    with subprocess.Popen(
      [compiler, *_FLAGS, *include, *sources, '-o', str(path)],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      start_new_session=True,
    ) as process:
      try:
        status = process.wait(_COMPILE_SECONDS)
      except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, subprocess.TimeoutExpired):
          raise OSError(
            f'{compiler} had not finished after {_COMPILE_SECONDS} s'
          ) from error
        raise
    log.seek(0)
    lines = log.read().splitlines()
  if status:
    wrong = [line.strip() for line in lines if 'error' in line.lower()]
    said = [*wrong, *lines, f'{compiler} ended with status {status}']
    raise OSError(said[0])


def _compiler() -> str:
  names = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++']
  for name in (*names, 'clang++') if len(names) > 1 else names:
    found = shutil.which(name)
    if found:
      return found
  raise FileNotFoundError(f'no C++ compiler: {" or ".join(names)} not found')
