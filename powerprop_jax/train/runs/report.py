"""Figures and report.html of a run, from nothing but the files in its folder.

It needs neither the data nor the checkpoints: config.json, metrics.jsonl and
results.json say enough. Figures that need the weights were drawn by the run
while it had them, and are shown as they are.
"""

import dataclasses
import pathlib

from powerprop_jax.files.tables import Row
from powerprop_jax.report import html, plotting, records
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.runs import folder, json_files, metrics
from powerprop_jax.train.runs.errors import UserError

_TITLES = {
  'train': 'Training',
  'prune': 'One-shot pruning of a trained network',
  'one_shot_pruning': 'One-shot pruning',
}
_SCOPES = {
  'global': 'all layers ranked together',
  'layer': 'each layer ranked by itself',
}


@dataclasses.dataclass(frozen=True)
class _Named:
  """Settings that say what was trained."""

  net: str
  data: DataConfig


def write(path: str | pathlib.Path) -> pathlib.Path:
  """Draws the figures of a run again and writes its report.html.

  Args:
    path: the folder of a run of `powerprop train`, `powerprop prune` or
      experiments.one_shot_pruning, complete or not.

  Returns:
    The path of report.html. It, learning_curves.png and accuracy_*.png are
    replaced, nothing else.

  Raises:
    UserError: if the folder holds no run, or one of another program, or a file
      of the run cannot be read. Nothing is written then.
  """
  path = pathlib.Path(path).expanduser()
  stored = folder.read_config(path)
  if stored['program'] not in _TITLES:
    raise UserError(
      f'{path} holds a run of {stored["program"]}, which writes its report '
      f'itself. Run it again with --resume: {stored["command"]}'
    )
  settings = stored['config']
  trained = settings.get('trained', settings)
  try:
    of = json_files.part_from_json(_Named, trained)
  except UserError as error:
    raise UserError(f'{path / "config.json"}: {error}') from error
  name = f'{of.net} on {of.data.name}'
  results = _read_records(path / 'results.json')
  weights = _read_records(path / 'weights.json')
  drawn = _draw(path, name, results, trained.get('num_classes'))
  saved = {
    key: plotting.save(figure, path / f'{key}.png')
    for key, figure in drawn.items()
  }
  sections = [
    _results_section(results, saved),
    *_training_section(saved),
    *_weights_section(path, weights, saved),
  ]
  return html.write_report(
    path / 'report.html',
    title=_TITLES[stored['program']],
    subtitle=f'{name}, {stored["date"]}',
    config=settings,
    sections=sections,
  )


def _read_records(path: pathlib.Path) -> list[Row]:
  """Records of a JSON file; none for a run that was stopped before."""
  if not path.exists():
    return []
  found = json_files.read_json(path)
  if not isinstance(found, list) or not all(
    isinstance(record, dict) for record in found
  ):
    raise UserError(
      f'{path} is not a list of records. Run the program again with --resume '
      'to write it anew.'
    )
  return found


def _draw(
  path: pathlib.Path,
  name: str,
  results: list[Row],
  num_classes: int | None,
) -> Row:
  """Every figure that the files of the run suffice for."""
  figures = {
    f'accuracy_{scope}': plotting.accuracy_against_sparsity(
      of_scope,
      title=f'{name}, one-shot pruning, {title}',
      num_classes=num_classes,
    )
    for scope, title in _SCOPES.items()
    if (of_scope := _of_scope(results, scope))
  }
  if (path / 'metrics.jsonl').exists():
    measured = metrics.read_metrics(path / 'metrics.jsonl')
    if measured:
      figures['learning_curves'] = plotting.learning_curves(
        measured, fields=('loss', 'validation_accuracy'), title=name
      )
  return figures


def _of_scope(results: list[Row], scope: str) -> list[Row]:
  return [record for record in results if record.get('scope') == scope]


def _results_section(
  results: list[Row], saved: dict[str, pathlib.Path]
) -> html.Section:
  if not results:
    return html.Section(
      'Results', 'None yet: the run was stopped before its end.'
    )
  scopes = [scope for scope in _SCOPES if _of_scope(results, scope)]
  if not scopes:
    return html.Section('Results', tables=[html.Table(results)])
  return html.Section(
    'Accuracy against sparsity',
    'Test accuracy after removing the smallest weights once, without '
    'retraining.',
    figures=[
      html.Figure(
        saved[f'accuracy_{scope}'],
        f'test accuracy against sparsity, {_SCOPES[scope]}',
      )
      for scope in scopes
    ],
    tables=[
      html.Table(
        records.pivot(_of_scope(results, scope)),
        f'Mean test accuracy over keys, {_SCOPES[scope]}.',
      )
      for scope in scopes
    ],
  )


def _training_section(saved: dict[str, pathlib.Path]) -> list[html.Section]:
  if 'learning_curves' not in saved:
    return []
  alt = 'loss and validation accuracy against the training step'
  figure = html.Figure(saved['learning_curves'], alt)
  return [html.Section('Training', figures=[figure])]


def _weights_section(
  path: pathlib.Path,
  weights: list[Row],
  saved: dict[str, pathlib.Path],
) -> list[html.Section]:
  """What the run itself drew and tabulated while it had the weights."""
  figures = [
    html.Figure(image, image.stem.replace('_', ' '))
    for image in sorted(path.glob('*.png'))
    if image.stem not in saved
  ]
  tables = []
  if weights:
    tables.append(html.Table(weights, 'Effective weights, leaf by leaf.'))
  if not figures and not tables:
    return []
  return [html.Section('Weights', figures=figures, tables=tables)]
