"""Many tasks in one network: accuracy of each over time, and what it took."""

from collections.abc import Sequence
from typing import Any

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from powerprop_jax.files.tables import Record, Row
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import drawing, style

_MAX_PANELS = 9
# Colour, marker and name of the methods (colours of Okabe and Ito).
_METHODS = {
  'efficient_packnet': ('#d55e00', 's', 'EfficientPackNet'),
  'packnet': ('#0072b2', 'D', 'PackNet'),
  'fine_tuning': ('#009e73', '^', 'fine-tuning'),
  'ewc': ('#cc79a7', 'v', 'EWC'),
  'separate': (style.QUIET, 'o', 'a network each'),
  'joint': (style.TEXT, 'X', 'all at once'),
}


def method_name(method: str) -> str:
  """What figures and tables call a method.

  Example:
    >>> method_name('ewc'), method_name('my_own')
    ('EWC', 'my own')
  """
  return _METHODS.get(method, ('', '', method.replace('_', ' ')))[2]


def accuracy_over_tasks(
  records: Sequence[Record], *, title: str = ''
) -> Figure:
  """Test accuracy against the number of tasks learned, a panel for each task.

  The first panel is the mean over the tasks so far; of many tasks there are
  eight evenly chosen ones. The scale is logarithmic in the error. A method that
  is measured only at the end, such as training on all tasks at once, is drawn
  as a level; what was measured before a task was learned is not drawn. Records
  are entries of accuracy matrices, with method, tasks_learned, task and
  accuracy.
  """
  fields = ('method', 'tasks_learned', 'task', 'accuracy')
  points = [
    record
    for record in records_lib.usable(records, *fields)
    if record['task'] <= record['tasks_learned']
  ]
  scheme = _scheme(points)
  last = max(record['tasks_learned'] for record in points)
  tasks = sorted({record['task'] for record in points})
  late = [
    key
    for key in scheme.looks
    if {r['tasks_learned'] for r in points if scheme.key(r) == key} == {last}
  ]
  if len(tasks) >= _MAX_PANELS:
    chosen = np.linspace(0, len(tasks) - 1, _MAX_PANELS - 1).round().astype(int)
    tasks = [tasks[index] for index in chosen]
  with style.house_style():
    figure, grid = style.panels(len(tasks) + 1)
    parts: list[tuple[str, Sequence[Record]]] = [
      ('mean of the tasks so far', _means(points))
    ]
    parts += [
      (f'task {task}', [r for r in points if r['task'] == task])
      for task in tasks
    ]
    for axes, (name, part) in zip(grid, parts, strict=True):
      drawing.accuracy_axis(axes, [r['accuracy'] for r in points])
      drawing.lines(axes, part, 'tasks_learned', 'accuracy', scheme)
      _levels(axes, part, scheme, late)
      axes.set_title(name)
      _tasks_axis(axes, last)
      drawing.label_first(axes, 'test accuracy (%)')
    note = records_lib.spread_note(points, 'accuracy')
    style.frame(
      figure,
      title,
      f'{note} Heights are logarithmic in the error.',
      style.handles(scheme.looks.values()),
    )
  return figure


def capacity(records: Sequence[Record], *, title: str = '') -> Figure:
  """Weights that belong to some task, and of each task to earlier ones, too.

  Records are one for each task, with method, tasks_learned, capacity_used and
  overlap (continual.metrics.capacity).
  """
  fields = ('method', 'tasks_learned', *_CAPACITY)
  points = records_lib.usable(records, *fields)
  scheme = _scheme(points)
  last = max(record['tasks_learned'] for record in points)
  with style.house_style():
    figure, grid = style.panels(len(_CAPACITY))
    for axes, (field, name) in zip(grid, _CAPACITY.items(), strict=True):
      drawing.lines(axes, points, 'tasks_learned', field, scheme)
      axes.set_title(name)
      _tasks_axis(axes, last)
      drawing.share_axis(axes, whole=True)
      drawing.label_first(axes, 'weights (%)')
    note = records_lib.spread_note(points, 'capacity_used')
    style.frame(figure, title, note, style.handles(scheme.looks.values()))
  return figure


_CAPACITY = {
  'capacity_used': 'weights in use by any task',
  'overlap': 'of a task, in use before',
}


def _scheme(records: Sequence[Record]) -> style.Scheme:
  """A line for each method and α; several α differ in line style."""
  found = {(record['method'], record.get('alpha')) for record in records}
  names = [name for name in _METHODS if name in {m for m, _ in found}]
  names += sorted({m for m, _ in found} - set(names))
  looks = {}
  for method in names:
    alphas = sorted({a for m, a in found if m == method and a is not None})
    for index, alpha in enumerate(alphas or [None]):
      colour, marker, _ = _METHODS.get(method, (style.RULE, 'h', ''))
      label = method_name(method)
      if alpha is not None and len(alphas) > 1:
        label = f'{label}, {style.alpha_label(alpha)}'
      line = ('--', '-', '-.', ':')[index % 4] if len(alphas) > 1 else '-'
      looks[method, alpha] = style.Look(colour, marker, line, label)
  return style.Scheme(lambda r: (r['method'], r.get('alpha')), looks)


def _levels(
  axes: Axes,
  records: Sequence[Record],
  scheme: style.Scheme,
  keys: Sequence[Any],
) -> None:
  """Dotted levels of what was measured only once, at the end."""
  for key in keys:
    part = [r['accuracy'] for r in records if scheme.key(r) == key]
    finite = [value for value in part if records_lib.is_finite(value)]
    if finite:
      colour = scheme.looks[key].color
      axes.axhline(np.mean(finite), color=colour, linestyle=':', linewidth=1.2)


def _means(records: Sequence[Record]) -> list[Row]:
  """Means over the tasks so far, where all of them were measured."""
  rows: dict[tuple[Any, ...], list[Any]] = {}
  for record in records:
    place = tuple(record.get(field) for field in _PLACE)
    rows.setdefault(place, []).append(record['accuracy'])
  return [
    {
      **dict(zip(_PLACE, place, strict=True)),
      'accuracy': float(np.mean(values))
      if all(records_lib.is_finite(value) for value in values)
      else None,
    }
    for place, values in rows.items()
    if len(values) == place[-1]
  ]


_PLACE = ('method', 'alpha', 'key', 'tasks_learned')


def _tasks_axis(axes: Axes, last: int) -> None:
  axes.set_xlim(1 - 0.04 * last, last + 0.04 * last)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axes.set_xlabel('tasks learned')
