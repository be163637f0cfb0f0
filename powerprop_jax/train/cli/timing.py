"""Programs that are compared take turns, and what matters is their ratio.

They run one after the other again and again, so that whatever else the machine
does meets all of them. Ratios are taken between neighbouring runs, and their
median is what counts.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import itertools
import math
import os
import platform
import random
import statistics
import time
from typing import Any, NamedTuple

import jax
import numpy as np

# A program to measure; it may return arrays that are still being computed.
Program = Callable[[], Any]


class Times(NamedTuple):
  """Seconds that a program took, one entry a run.

  Attributes:
    first: the first run, compilation included, which is not in the others.
    wall: by the clock.
    cpu: of all processor cores together.
  """

  first: float
  wall: list[float]
  cpu: list[float]


def take_turns(
  programs: Mapping[str, Program],
  repeats: int,
  on_run: Callable[[int], object] = lambda num_runs: None,
) -> dict[str, Times]:
  """Runs programs one after the other, again and again.

  Each round has another order, the same every time: what a program finds in
  caches, and threads that another one left awake, change its time by a third
  where it takes less than a millisecond.

  Args:
    on_run: is told after each run how many have been made.
  """
  num_runs = itertools.count(1)
  found = {}
  for name, program in programs.items():
    found[name] = Times(run_once(program)[0], [], [])
    on_run(next(num_runs))
  shuffled = random.Random(0)
  for _ in range(repeats):
    for name in shuffled.sample(list(programs), len(programs)):
      wall, cpu = run_once(programs[name])
      found[name].wall.append(wall)
      found[name].cpu.append(cpu)
      on_run(next(num_runs))
  return found


def seconds_of_calls(
  programs: Mapping[str, Program], repeats: int, run_seconds: float
) -> dict[str, list[float]]:
  """Seconds of one call of each program, run by run, in turns.

  A run repeats a call for about run_seconds, each waiting for the one before:
  one of a small network takes no longer than reading the clock.
  """
  counts = {}
  for name, program in programs.items():
    run_once(program)  # compiles
    seconds = min(run_once(program)[0] for _ in range(3))
    counts[name] = max(1, math.ceil(run_seconds / max(seconds, 1e-9)))

  def repeated(program: Program, count: int) -> None:
    for _ in range(count):
      jax.block_until_ready(program())

  found = take_turns(
    {
      name: functools.partial(repeated, program, counts[name])
      for name, program in programs.items()
    },
    repeats,
  )
  return {
    name: [seconds / counts[name] for seconds in times.wall]
    for name, times in found.items()
  }


def run_once(program: Program) -> tuple[float, float]:
  """Runs a program to the end: (seconds by the clock, seconds of all cores)."""
  cpu_start, wall_start = time.process_time(), time.perf_counter()
  jax.block_until_ready(program())
  wall = time.perf_counter() - wall_start
  return wall, time.process_time() - cpu_start


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
  """Median of times[i] / base[i], the ratios of neighbouring runs.

  Example:
    >>> median_ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    2.0
  """
  return statistics.median(a / b for a, b in zip(times, base, strict=True))


def environment() -> str:
  """One line about the versions and the machine.

  It starts JAX, and so must come after everything that sets flags.
  """
  device = jax.devices()[0]
  return (
    f'Python {platform.python_version()}, jax {jax.__version__}, '
    f'numpy {np.__version__}, {platform.system()} {platform.machine()}, '
    f'{os.cpu_count()} CPU cores; JAX runs on {device.device_kind}'
  )
