"""What a folder says of its own run, for the commands that read it later.

A program gives it to RunFolder, which writes it into config.json. With it
`powerprop export`, `bench`, `prune` and `report` work on any run, and know
nothing of the program that made it.
"""

import dataclasses
import pathlib
from typing import Any

from powerprop_jax.files import json_files
from powerprop_jax.files.tables import Row
from powerprop_jax.report.records import over_keys
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks in the checkpoints of a run, which hold TrainStates.

  There is one for each pair of a power and a key, in the order of
  ensemble.product, unless they are paired.

  Attributes:
    net: name of the network, see nets.make.
    data: the data set.
    num_steps: training steps that the run is to make.
    alphas: the powers; of a network whose power changes, the first one.
    keys: the keys.
    are_paired: whether each power is of the network of one key, in their order.
    is_stacked: whether the state has a leading axis over the networks; without
      one there is a single network.
    num_test: test examples to score on, the first ones; None is all.
    normalise: whether the network sees channels of mean 0 and deviation 1.
    dct: whether its layers have a cosine transform, see nets.make.
  """

  net: str
  data: DataConfig
  num_steps: int
  alphas: tuple[float, ...]
  keys: tuple[int, ...]
  are_paired: bool = False
  is_stacked: bool = True
  num_test: int | None = None
  normalise: bool = False
  dct: bool = False


@dataclasses.dataclass(frozen=True)
class Records:
  """Which records of a run.

  Attributes:
    files: JSON files of records or of measurements; a pattern within the run.
    where: fields and the values that they must have.
    having: fields that a record must have.
    settings: fields that a record gets from the settings of the folder that
      its file lies in, by the name of the setting.
  """

  files: str = 'results.json'
  where: Row = dataclasses.field(default_factory=dict)
  having: tuple[str, ...] = ()
  settings: Row = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of the page; left out where there is nothing to draw it from.

  Attributes:
    name: of its file, without .png.
    alt: what it shows, in words.
    draw: the function of report.plotting that draws it; '' if the run itself
      does, while it has the weights.
    records: what it is drawn from.
    options: more arguments of the function.
  """

  name: str
  alt: str
  draw: str = ''
  records: Records = Records()
  options: Row = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the page; left out where there are no records.

  Attributes:
    caption: a line above it.
    records: its rows.
    pivot: arguments of report.records.pivot; None shows records as they are.
  """

  caption: str = ''
  records: Records = Records()
  pivot: Row | None = None


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page; left out where nothing in it can be shown yet."""

  title: str
  text: str = ''
  figures: tuple[Figure, ...] = ()
  tables: tuple[Table, ...] = ()


@dataclasses.dataclass(frozen=True)
class Page:
  """The report of a run.

  Attributes:
    title: its heading: what was done, with the network and the data set.
    subtitle: more of it, such as the powers and keys; the date follows.
    sections: its parts; the settings of the run follow.
  """

  title: str
  subtitle: str
  sections: tuple[Section, ...]


@dataclasses.dataclass(frozen=True)
class Contents:
  """What is to be known of a run beside its settings.

  Attributes:
    networks: those of its checkpoints; None if there are none that the
      commands could read.
    page: its report.
    instead: why there are no networks, and what to do, after a colon.
  """

  networks: Networks | None = None
  page: Page | None = None
  instead: str = ''


def read(path: pathlib.Path, stored: Row) -> Contents:
  """What folder.read_config gave for a run, of its contents.

  Raises:
    UserError: if they are spoilt, or were not written, as by version 0.1.0.
  """
  if 'contents' not in stored:
    raise UserError(
      f'{path} was written by version 0.1.0, which did not say what a run '
      'holds. Continue it with --resume, and it says so: '
      f'{stored["command"]}'
    )
  try:
    return json_files.from_json(Contents, stored['contents'])
  except ValueError as error:
    raise UserError(f'{path / "config.json"}: {error}') from error


def table_of(name: str, caption: str = '') -> Table:
  """A table of the rows that a program has written into NAME.json."""
  return Table(caption, Records(f'{name}.json'))


def weights_section(
  *figures: Figure,
  text: str = '',
  caption: str = 'Effective weights, leaf by leaf.',
) -> Section:
  """Figures of weights, and a table of weights.json, with its caption."""
  return Section('Weights', text, figures, (table_of('weights', caption),))


def training_section(title: str, records: Records | None = None) -> Section:
  """Loss and validation accuracy against the step, from metrics.jsonl."""
  figure = Figure(
    'learning_curves',
    'loss and validation accuracy against the training step',
    'learning_curves',
    records or Records('metrics.jsonl'),
    {'fields': ['loss', 'validation_accuracy'], 'title': title},
  )
  return Section('Training', figures=(figure,))


def mask_sections(
  *shown: tuple[str, str, Records],
) -> tuple[Section, Section]:
  """Densities of the layers, and how many connections moved, by step.

  Args:
    *shown: the end of the names of a pair of figures, their title, and the
      records of mask_watch that they are drawn from, each with its method.
  """

  def section(heading: str, kind: str, draw: str, field: str) -> Section:
    return Section(
      heading,
      figures=tuple(
        Figure(
          f'{kind}{end}',
          f'{kind} by step, {kind}{end}',
          draw,
          dataclasses.replace(records, having=(field,)),
          {'title': title},
        )
        for end, title, records in shown
      ),
    )

  return (
    section('Densities of the layers', 'layers', 'layer_densities', 'layer'),
    section('Connections that moved', 'churn', 'mask_churn', 'churn'),
  )


def pruning_section(
  title: str, num_classes: int, scopes: tuple[str, ...], num_keys: int
) -> Section:
  """Accuracy after one-shot pruning against sparsity, for each scope."""
  figures, tables = [], []
  for scope in scopes:
    records = Records(where={'scope': scope})
    options: Any = {
      'title': f'{title}, one-shot pruning, {SCOPES[scope]}',
      'num_classes': num_classes,
    }
    figures.append(
      Figure(
        f'accuracy_{scope}',
        f'test accuracy against sparsity, {SCOPES[scope]}',
        'accuracy_against_sparsity',
        records,
        options,
      )
    )
    caption = f'Test accuracy{over_keys(num_keys)}, {SCOPES[scope]}.'
    tables.append(Table(caption, records, pivot={}))
  return Section(
    'Accuracy against sparsity',
    'Test accuracy after removing the smallest weights once, without '
    'retraining.',
    tuple(figures),
    tuple(tables),
  )


SCOPES = {
  'global': 'all layers ranked together',
  'layer': 'each layer ranked by itself',
}
