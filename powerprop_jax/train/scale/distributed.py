"""Several processes, on one machine or many, that train one network.

Every process runs the same program on its own devices, and JAX joins these into
one mesh. Each is called a host here, as most machines run a single one. All
that is random derives from keys, so hosts that were started with the same
settings make the same choices without talking about them.

Two hosts on one machine, with four simulated devices each, for any program
whose settings have a field `hosts: HostsConfig`:

    python -m powerprop_jax.train.scale.distributed --count 2 --devices 4 -- \
      python program.py --learning-rate 0.1

On many machines a scheduler starts the hosts. Under Slurm:

    srun python program.py --learning-rate 0.1 --hosts.coordinator cluster
"""

from collections.abc import Sequence
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import arguments as command_lib
from powerprop_jax.train.runs import folder
from powerprop_jax.train.runs.errors import UserError

CLUSTER = 'cluster'
_DEVICES_FLAG = '--xla_force_host_platform_device_count'
_GRACE = 10.0  # seconds to end after another host has failed


@dataclasses.dataclass(frozen=True)
class HostsConfig:
  """Which processes train together."""

  # Where the first one listens, as 'address:port'; 'cluster' to ask Slurm, Open
  # MPI, Kubernetes, a TPU pod or the variables JAX_…; '' for a single process.
  coordinator: str = ''
  # How many there are; a cluster knows.
  count: int | None = None
  # Which one this is, from 0; a cluster knows.
  index: int | None = None
  # Seconds to wait for the others.
  timeout: int = 300


def initialise(config: HostsConfig) -> None:
  """Joins the processes; does nothing for a single one.

  To be called once, before JAX touches a device. On CPUs the processes talk
  through gloo, unless JAX_CPU_COLLECTIVES_IMPLEMENTATION says otherwise.

  If the others do not come in time, an error is printed and this process ends
  with status 2: JAX, left alone, would abort it. JAX catches SIGTERM in
  processes that it has joined; they learn of it from SignalWatch.

  Example:
    >>> initialise(HostsConfig())
    >>> jax.process_index(), jax.process_count()
    (0, 1)
  """
  _check(config)
  if not config.coordinator:
    return
  where: Row = {}
  if config.coordinator != CLUSTER:
    where = {
      'coordinator_address': config.coordinator,
      'cluster_detection_method': 'deactivate',
    }
    if config.coordinator.startswith(('127.0.0.1:', 'localhost:')):
      # JAX would listen to the whole network.
      where['coordinator_bind_address'] = config.coordinator
  # JAX waits outside Python, and aborts the process when its own time is up.
  giving_up = threading.Timer(config.timeout, _give_up, [config])
  giving_up.daemon = True
  giving_up.start()
  try:
    jax.distributed.initialize(
      num_processes=config.count,
      process_id=config.index,
      initialization_timeout=config.timeout + 60,
      **where,
    )
  except ValueError as error:
    raise UserError(
      f'cannot join the other processes, as no cluster was found: {error} Give '
      "--hosts.coordinator 'address:port', --hosts.count and --hosts.index, or "
      'start the program with srun or mpirun.'
    ) from error
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f'cannot join the other processes at {config.coordinator}: '
      f'{str(error).splitlines()[0]}. Is the port in use? Choose another.'
    ) from error
  finally:
    giving_up.cancel()


def _give_up(config: HostsConfig) -> None:
  count = config.count or 'all'
  print(
    f'error: not all of {count} processes came to {config.coordinator} within '
    f'{config.timeout} seconds. Were all started, with the same address and '
    'count and an index each, and can they reach it?',
    file=sys.stderr,
    flush=True,
  )
  os._exit(2)


def _check(config: HostsConfig) -> None:
  count, index = config.count, config.index
  if config.timeout < 1:
    raise UserError(
      f'hosts.timeout must be at least 1 second, got {config.timeout}.'
    )
  if not config.coordinator:
    if count not in (None, 1) or index not in (None, 0):
      raise UserError(
        f'hosts.count {count} and hosts.index {index} are of no use without '
        "hosts.coordinator. Give it as 'address:port'."
      )
    return
  if config.coordinator != CLUSTER:
    _, colon, port = config.coordinator.rpartition(':')
    if not colon or not port.isdigit():
      raise UserError(
        f"hosts.coordinator must be 'address:port' or {CLUSTER!r}, got "
        f'{config.coordinator!r}.'
      )
    if count is None or index is None:
      raise UserError(
        f'hosts.coordinator {config.coordinator} needs hosts.count and '
        f'hosts.index, got {count} and {index}.'
      )
  if count is not None and count < 1:
    raise UserError(f'hosts.count must be at least 1, got {count}.')
  if index is not None and not 0 <= index < (count or index + 1):
    raise UserError(
      f'hosts.index must be from 0 to hosts.count - 1, got {index} of {count}.'
    )


def check_agreement(settings: object, name: str = 'settings') -> None:
  """Refuses to train when the hosts were started differently.

  They would compile different programs and wait for each other for ever, or
  draw different masks. The settings, made of what json_files.to_json takes, and
  the version of JAX must be the same; every host names one that differs from
  the first, and how.

  Example:
    >>> check_agreement(HostsConfig())
  """
  if jax.process_count() == 1:
    return
  own = {'jax': jax.__version__, name: json_files.to_json(settings)}
  text = json.dumps(own, sort_keys=True).encode()
  texts = _gathered(text)
  for host, other in enumerate(texts):
    if other != texts[0]:
      changes = folder.differences(json.loads(texts[0]), json.loads(other))
      differences = '; '.join(changes)
      raise UserError(
        f'host {host} differs from host 0: {differences}. Start all hosts with '
        'the same command, versions and environment.'
      )


def _gathered(value: bytes) -> list[bytes]:
  """The bytes that each host has, in the order of the hosts."""
  gather = multihost_utils.process_allgather
  sizes = np.ravel(gather(np.array([len(value)], np.int32)))
  padded = np.frombuffer(value.ljust(int(sizes.max())), np.uint8)
  rows = np.reshape(gather(padded), (len(sizes), -1))
  return [bytes(row[:n]) for row, n in zip(rows, sizes, strict=True)]


@dataclasses.dataclass(frozen=True)
class LocalConfig:
  """Hosts on this machine, started by a single command."""

  # How many.
  count: int = 2
  # Simulated devices of each, on a CPU; 0 leaves the real ones.
  devices: int = 0


def run_local(program: Sequence[str], config: LocalConfig) -> int:
  """Runs a program as several hosts on this machine, and waits for all.

  Each gets the arguments --hosts.coordinator, --hosts.count and --hosts.index
  behind its own. When one fails the others are asked to end, since they would
  wait for it, and are killed ten seconds later. SIGTERM is passed on.

  Returns:
    0 if all ended well; else the status of the first one that did not, 128 + n
    after signal n.
  """
  if not program:
    raise UserError('there is no program to run: write it behind --.')
  if config.count < 1 or config.devices < 0:
    raise UserError(
      'count must be at least 1 and devices at least 0, got '
      f'{config.count} and {config.devices}.'
    )
  environment = dict(os.environ)
  if config.devices:
    flags = environment.get('XLA_FLAGS', '')
    environment['XLA_FLAGS'] = f'{flags} {_DEVICES_FLAG}={config.devices}'
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  joined = [f'--hosts.coordinator={address}', f'--hosts.count={config.count}']
  hosts: list[subprocess.Popen[bytes]] = []

  def pass_on(number: int, frame: object) -> None:
    del frame
    for host in hosts:
      host.send_signal(number)

  before = signal.signal(signal.SIGTERM, pass_on)
  try:
    for index in range(config.count):
      arguments = [*program, *joined, f'--hosts.index={index}']
      hosts.append(subprocess.Popen(arguments, env=environment))
    return _wait(hosts)
  except OSError as error:
    raise UserError(f'cannot run {program[0]}: {error}.') from error
  except KeyboardInterrupt:
    # It reached every host too, some of which may be saving.
    _wait(hosts, _GRACE)
    raise
  finally:
    for host in hosts:
      host.kill()
      host.wait()
    signal.signal(signal.SIGTERM, before)


def _wait(
  hosts: Sequence['subprocess.Popen[bytes]'], seconds: float = math.inf
) -> int:
  """The first status that is not 0, when all have ended or time is up."""
  status, until = 0, time.time() + seconds
  while time.time() < until:
    # Asked of every host: those not asked would seem to be running.
    statuses = [host.poll() for host in hosts]
    status = status or next(filter(None, statuses), 0)
    if None not in statuses:
      break
    if status and until == math.inf:
      until = time.time() + _GRACE
      for host in hosts:
        host.terminate()
    time.sleep(0.1)
  return 128 - status if status < 0 else status


def main(args: Sequence[str] | None = None) -> int:
  """run_local from a command line: options, '--', and the program."""
  given = list(sys.argv[1:] if args is None else args)
  where = given.index('--') if '--' in given else len(given)
  statuses = []
  status = command_lib.run(
    lambda config: statuses.append(run_local(given[where + 1 :], config)),
    {'local': LocalConfig()},
    prog='python -m powerprop_jax.train.scale.distributed',
    description='Runs a program, written behind --, as several hosts here.',
    args=given[:where],
  )
  return status or statuses[0]


if __name__ == '__main__':
  sys.exit(main())
