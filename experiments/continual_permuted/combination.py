"""One run of a method, α and key, learned or read."""

import dataclasses
from typing import NamedTuple

from experiments.common import combinations as combination_runs
from experiments.continual_permuted import (
  baselines,
  methods,
  packing,
  runs,
  streams,
)
from experiments.continual_permuted.config import Config
from experiments.continual_permuted.methods import Method, Name, Problem
from powerprop_jax.files.tables import Row

PROGRAM = 'continual_permuted'


class Combination(NamedTuple):
  """One run.

  Attributes:
    method: the method.
    alpha: the power; 1 for dense methods.
    key: seed of the initial weights and of the order of the data.
  """

  method: Name
  alpha: float
  key: int

  @property
  def name(self) -> str:
    """The name of its folder."""
    return f'{self.method}_alpha_{self.alpha:g}_key_{self.key}'


def with_rate(config: Config, rate: float) -> Config:
  """The same settings with another learning rate."""
  optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
  return dataclasses.replace(config, optimizer=optimizer)


def make_problem(config: Config, combination: Combination) -> Problem:
  """What a combination has to learn."""
  if config.rates and combination.method in methods.SPARSE:
    rate = config.rates[config.alphas.index(combination.alpha)]
    config = with_rate(config, rate)
  stream = streams.load(config.stream, config.data)
  return Problem(
    stream=stream,
    num_classes=max(task.num_classes for task in stream),
    is_multi_head=config.stream.own_heads,
    key=combination.key,
    net=config.net,
    optimizer=config.optimizer,
    ewc=config.ewc,
  )


def make_method(config: Config, combination: Combination) -> Method:
  """How it learns that."""
  method, alpha, _ = combination
  problem = make_problem(config, combination)
  # Spelled out for the type checker.
  if method == 'efficient_packnet' or method == 'packnet':
    return packing.make(method, problem, config.packing, alpha)
  return baselines.make(method, problem)


def learn(
  config: Config, description: str, combination: Combination
) -> list[Row]:
  """Results of a combination: learned, or read where that is done."""
  folder = combination_runs.folder(config, combination, PROGRAM)
  if folder.is_complete:
    return combination_runs.read(folder)
  results = runs.run(
    make_method(config, combination),
    make_problem(config, combination),
    folder,
    measure_every=config.measure_every,
    description=description,
  )
  return combination_runs.write(folder, results)
