"""Eight simulated devices, strict promotion rules, and warnings as errors."""

import ctypes
import gc
import os
import pathlib

import jaxlib

# Programs that tests start find `experiments`, which is not installed.
os.environ['PYTHONPATH'] = os.pathsep.join(
  (str(pathlib.Path(__file__).parents[1]), os.getenv('PYTHONPATH', ''))
).rstrip(os.pathsep)

# Before JAX starts: it reads the flags once.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
# XLA aborts at flags that it does not know, as versions that were not tried may
# not.
if jaxlib.__version__.startswith('0.10.'):
  # Eight devices on a few busy cores may wait for each other for longer than
  # the 40 seconds after which XLA aborts.
  os.environ['XLA_FLAGS'] += (
    ' --xla_cpu_collective_call_terminate_timeout_seconds=600'
  )
  # Most of the suite's time goes into compiling thousands of small programs,
  # which takes a quarter of it without LLVM's optimisations. What these change
  # is of LLVM's making: POWERPROP_TEST_OPTIMISED=1 compiles as users do.
  if os.environ.get('POWERPROP_TEST_OPTIMISED', '0') == '0':
    os.environ['XLA_FLAGS'] += (
      ' --xla_backend_optimization_level=0'
      ' --xla_llvm_disable_expensive_passes=true'
      ' --xla_cpu_use_fusion_emitters=false'
      ' --xla_cpu_parallel_codegen_split_count=1'
    )

import chex
import jax
import pytest

_FLAGS = os.environ['XLA_FLAGS']
jax.devices()  # Reads the flags, before a program that a test calls sets more.

jax.config.update('jax_numpy_rank_promotion', 'raise')

# Modules whose tests run with strict dtype promotion as well. Haiku's BatchNorm
# and Optax's Adam are not strict-clean, so what uses them is not among them.
_STRICT = {
  'distributions_test',
  'masks_test',
  'reparam_test',
  'schedules_test',
  'scores_test',
  'topk_test',
}


def pytest_addoption(parser):
  parser.addoption(
    '--compositions',
    type=int,
    help='draws of tests/optim/compositions_test.py, from a new seed',
  )


def pytest_collection_modifyitems(items):
  # What takes minutes goes first, so that the other processes have something
  # to do meanwhile.
  items.sort(key=lambda item: item.module.__name__ != 'site_test')


@pytest.fixture(autouse=True)
def _strict_dtype_promotion(request):
  if request.module.__name__.rpartition('.')[2] not in _STRICT:
    yield
    return
  with jax.numpy_dtype_promotion('strict'):
    yield


@pytest.fixture(autouse=True)
def _same_compiler_flags():
  # Programs set flags for the processes that they start. One started by a later
  # test would round otherwise than this process, which has read its flags.
  os.environ['XLA_FLAGS'] = _FLAGS


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
  # chex counts traces by the name and line of a function, across tests.
  chex.clear_trace_counter()


_LIBC = ctypes.CDLL(None)
_clears_above = 1.25 * 2**30  # bytes


@pytest.fixture(autouse=True)
def _forgotten_programs():
  # Compiled programs of many tests come to many gigabytes.
  global _clears_above
  yield
  if _resident_bytes() > _clears_above:
    jax.clear_caches()
    gc.collect()
    if hasattr(_LIBC, 'malloc_trim'):  # glibc keeps what is freed
      _LIBC.malloc_trim(0)
    # What is not given back by now never is.
    _clears_above = max(_clears_above, _resident_bytes() + 2**28)


def _resident_bytes():
  """Memory of this process now; 0 where the system does not tell."""
  try:
    with open('/proc/self/statm') as file:
      return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
  except OSError:
    return 0


@pytest.fixture
def tfds_dir():
  """Folder of prepared TFDS data sets, or a skip with the reason."""
  folder = os.environ.get('POWERPROP_TFDS_DIR')
  if not folder:
    pytest.skip('needs real data: set POWERPROP_TFDS_DIR to a TFDS data folder')
  return folder


@pytest.fixture(scope='session')
def images(tmp_path_factory):
  """A data set of ten JPEG files, for tests that only read it."""
  import image_files

  return image_files.make_set(
    tmp_path_factory.mktemp('images'), image_files.examples(image_files.COUNT)
  )


@pytest.fixture(scope='session')
def damaged(tmp_path_factory):
  """The same, of which three files are no images."""
  import image_files

  return image_files.make_set(
    tmp_path_factory.mktemp('damaged'), image_files.damaged()
  )
