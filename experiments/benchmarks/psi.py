r"""What ψ costs beside a scaled copy of the same array.

A scaled copy reads and writes every weight once; no map can be faster. Runs are
interleaved; the table gives medians, and ratios of neighbouring runs.

    python -m experiments.benchmarks.psi

The numbers that it gave are in docs/results/benchmarks.md.
"""

from collections.abc import Callable
import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp

import experiments
import powerprop_jax as pp
from powerprop_jax.core import reparam
from powerprop_jax.files import tables
from powerprop_jax.train.cli import timing
from powerprop_jax.train.runs import errors


@dataclasses.dataclass(frozen=True)
class Config:
  """Time of ψ beside a scaled copy."""

  # Weights; the default is about a ResNet-50.
  size: int = 25_600_000
  # Powers known when the function is compiled.
  alphas: tuple[float, ...] = (1.25, 1.3, 1.5, 2.0, 3.0, 4.0)
  # Timed runs of each variant.
  repeats: int = 21


def main(config: Config) -> None:
  """Prints the table."""
  errors.check_positive(config, 'size', 'repeats')
  for alpha in config.alphas:
    reparam.check_alpha(alpha)
  phi = 0.05 * jax.random.normal(jax.random.key(0), (config.size,))
  traced = jnp.float32(1.7)
  of_traced = jax.jit(pp.psi)
  general = jax.jit(lambda x, a: jnp.sign(x) * jnp.abs(x) ** a)
  functions: dict[str, Callable[[jax.Array], jax.Array]] = {
    'scaled copy': jax.jit(lambda x: 0.5 * x)
  }
  for alpha in config.alphas:
    functions[f'ψ, α = {alpha:g}'] = jax.jit(
      lambda x, alpha=alpha: pp.psi(x, alpha)
    )
  functions['ψ, α traced'] = lambda x: of_traced(x, traced)
  functions['sign · abs ** α, traced'] = lambda x: general(x, traced)

  programs = {
    name: functools.partial(function, phi)
    for name, function in functions.items()
  }
  times = timing.take_turns(programs, config.repeats)
  base = times['scaled copy']
  print(
    f'{config.size:,} float32 weights; medians of {config.repeats} interleaved '
    f'runs.\n{timing.environment()}\n'
  )
  rows = [
    {
      'function': name,
      'ms': round(1e3 * statistics.median(found.wall), 1),
      'ratio': round(timing.median_ratio(found.wall, base.wall), 2),
    }
    for name, found in times.items()
  ]
  print(tables.text_table(rows))


if __name__ == '__main__':
  experiments.start(main, {'default': Config()})
