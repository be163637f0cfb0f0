"""Compiled kernels for a CPU, built on the machine that runs them.

The source (*.cc) comes with the package. The first program that
wants a kernel compiles it with the C++ compiler of the machine, for its very
processor, which takes a few seconds, and keeps the library in a folder:
$POWERPROP_CACHE_DIR, or powerprop_jax under $XDG_CACHE_HOME or ~/.cache. Where
there is no compiler everything else works as before, slower; `status` says why.

$CXX names another compiler; $POWERPROP_NATIVE=0 turns the kernels off.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
import warnings

import jax
import jaxlib

_SOURCES = ('sparse_matmul.cc', 'sparse_convolution.cc')
_HEADERS = ('common.h',)
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

# Names of the functions, in the library and, lower case, in JAX programs.
_FUNCTIONS = {
  'powerprop_multiply': 'PowerpropMultiply',
  'powerprop_dot': 'PowerpropDot',
  'powerprop_index': 'PowerpropIndex',
  'powerprop_convolve': 'PowerpropConvolve',
  'powerprop_convolution_to_input': 'PowerpropConvolutionToInput',
  'powerprop_convolution_to_values': 'PowerpropConvolutionToValues',
}


def cache_folder() -> pathlib.Path:
  """Where compiled kernels and measurements of them are kept."""
  chosen = os.environ.get('POWERPROP_CACHE_DIR')
  if chosen:
    return pathlib.Path(chosen)
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'powerprop_jax'


def is_available() -> bool:
  """Whether compiled kernels can be used; compiles them at the first call."""
  return _load() == ''


def status() -> str:
  """'available', or why there are no compiled kernels."""
  return _load() or 'available'


def check_available() -> None:
  """Refuses to go on without compiled kernels.

  Raises:
    ValueError: if there are none.
  """
  if not is_available():
    raise ValueError(
      f'there are no compiled kernels: {status()}. Use other kernels '
      "(kernel_choice.use('loops', 'dense'))."
    )


@functools.cache
def machine() -> str:
  """The processor and what it can do, in a few characters."""
  described = [platform.machine(), platform.processor(), str(os.cpu_count())]
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  for start in ('model name', 'flags', 'Features'):
    described += [line for line in lines if line.startswith(start)][:1]
  return _digest('\n'.join(described))


@functools.cache
def _load() -> str:
  """Registers the kernels; '' or why that cannot be done."""
  if os.environ.get('POWERPROP_NATIVE', '1') in ('0', 'off', 'false'):
    return '$POWERPROP_NATIVE turns them off'
  try:
    library = ctypes.CDLL(str(_library()))
    for name, function in _FUNCTIONS.items():
      jax.ffi.register_ffi_target(
        name, jax.ffi.pycapsule(getattr(library, function)), platform='cpu'
      )
  except (OSError, subprocess.SubprocessError, AttributeError) as error:
    reason = _first_line(error)
    warnings.warn(
      f'sparse layers run without compiled kernels, slower: {reason}. Install '
      'a C++ compiler, or set POWERPROP_NATIVE=0 to do without silently.',
      RuntimeWarning,
      stacklevel=2,
    )
    return reason
  return ''


def _library() -> pathlib.Path:
  """The compiled library, from the folder or made now."""
  compiler = _compiler()
  here = pathlib.Path(__file__).parent
  sources = [here / name for name in _SOURCES]
  headers = [here / name for name in _HEADERS]
  text = ''.join(path.read_text() for path in (*sources, *headers))
  version = subprocess.run(
    [compiler, '--version'], capture_output=True, text=True, check=True
  ).stdout
  digest = _digest(
    '\n'.join([text, version, *_FLAGS, jaxlib.__version__, machine()])
  )
  path = cache_folder() / f'kernels_{digest}.so'
  if path.exists():
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  # Under a name of its own, for several programs may do this at once.
  with tempfile.TemporaryDirectory(dir=path.parent) as folder:
    made = pathlib.Path(folder) / path.name
    subprocess.run(
      [
        compiler,
        *_FLAGS,
        '-I',
        jax.ffi.include_dir(),
        *map(str, sources),
        '-o',
        str(made),
      ],
      capture_output=True,
      text=True,
      check=True,
      timeout=_COMPILE_SECONDS,
    )
    os.replace(made, path)
  return path


def _compiler() -> str:
  names = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++']
  for name in (*names, 'clang++') if len(names) > 1 else names:
    found = shutil.which(name)
    if found:
      return found
  raise FileNotFoundError(f'no C++ compiler: {" or ".join(names)} not found')


def _first_line(error: Exception) -> str:
  """What went wrong, in a line."""
  output = getattr(error, 'stderr', None)
  lines = (output if isinstance(output, str) else str(error)).splitlines()
  wrong = [line for line in lines if 'error' in line.lower()] or lines
  return wrong[0].strip() if wrong else repr(error)


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]
