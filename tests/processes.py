"""Processes of Python that tests start, and sockets for them."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TWO_HOSTS = ('-m', 'powerprop_jax.train.scale.distributed', '--count', '2')


@contextlib.contextmanager
def started(*arguments, **variables):
  """A process that can import what tests can; ends with all that it started."""
  # The tests' own eight devices are not for others.
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  environment['PYTHONPATH'] = os.pathsep.join(sys.path)
  with subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    env=environment | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  ) as process:
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(*arguments, **variables):
  """Runs a process to its end, which must be a good one: what it printed."""
  with started(*arguments, **variables) as process:
    output, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
  return output


def free_port():
  """A port; the test is skipped where processes cannot listen to others."""
  try:
    with socket.create_server(('127.0.0.1', 0)) as probe:
      return probe.getsockname()[1]
  except OSError as error:
    pytest.skip(f'needs sockets on this machine: {error}')
