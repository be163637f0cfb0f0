"""Page and published numbers of experiments/imagenet_resnet50."""

from collections.abc import Sequence
import pathlib
from typing import Any

from powerprop_jax.files.tables import Row
from powerprop_jax.report import html, plotting
from powerprop_jax.train.runs import metrics

_Records = Sequence[Row]
# What is drawn of what is logged, and what the figure calls it. The axis of a
# name that ends in loss would be logarithmic.
_CURVES = {
  'loss': 'loss, training',
  'validation_loss': 'loss, validation',
  'images_per_second': 'images per second',
  'accuracy': 'training accuracy',
  'validation_accuracy': 'validation accuracy',
  'validation_top_5': 'top-5 accuracy',
  'validation_accuracy_ema': 'EMA accuracy',
}

# Top-1 in per cent by sparsity in per cent, for θ = φ, ResNet-50 at 224 × 224.
# Evci et al., Rigging the lottery, 2020, figure 2 and table 4; rows marked with
# others are quoted there.
_RIGL = 'Evci et al., 2020'
_DENSE = 76.8
_PUBLISHED: dict[tuple[str, str, float], tuple[dict[int, float], str]] = {
  ('static', 'uniform', 1): ({80: 70.6, 90: 65.8, 95: 59.5}, _RIGL),
  ('static', 'erk', 1): ({80: 72.1, 90: 67.7}, _RIGL),
  ('set', 'uniform', 1): ({80: 72.9, 90: 69.6, 95: 64.4}, _RIGL),
  ('rigl', 'uniform', 1): ({80: 74.6, 90: 72.0, 95: 67.5}, _RIGL),
  ('rigl', 'uniform', 5): ({80: 76.6, 90: 75.7, 95: 73.1}, _RIGL),
  ('rigl', 'erk', 1): ({80: 75.1, 90: 73.0, 95: 69.7}, _RIGL),
  ('rigl', 'erk', 5): ({80: 77.1, 90: 76.4, 95: 74.5}, _RIGL),
  ('snfs', 'uniform', 1): (
    {80: 74.2, 90: 72.3},
    'Dettmers & Zettlemoyer, 2019',
  ),
  ('snfs', 'erk', 1): ({80: 75.2, 90: 72.9, 95: 70.0}, _RIGL),
  ('pruning', 'uniform', 1): (
    {80: 75.6, 90: 73.9, 95: 70.6},
    'Gale et al., 2019',
  ),
  ('pruning', 'uniform', 1.5): (
    {80: 76.5, 90: 75.2, 95: 72.7},
    'Gale et al., 2019',
  ),
}


def published(method: str) -> list[Row]:
  """What is published of a method on ResNet-50 and ImageNet.

  Records with method, sparsity, allocation, length, top-1 accuracy and source;
  that of the dense network first.

  Example:
    >>> [r['accuracy'] for r in published('static')][:2]
    [0.768, 0.706]
  """
  dense = {
    'method': 'dense',
    'sparsity': 0.0,
    'allocation': None,
    'length': 1,
    'accuracy': _DENSE / 100,
    'source': _RIGL,
  }
  return [dense] + [
    {
      'method': name,
      'sparsity': sparsity / 100,
      'allocation': allocation,
      'length': length,
      'accuracy': round(accuracy / 100, 6),
      'source': source,
    }
    for (name, allocation, length), (by_sparsity, source) in _PUBLISHED.items()
    for sparsity, accuracy in by_sparsity.items()
    if name == method
  ]


def write(
  path: pathlib.Path,
  title: str,
  settings: Row,
  results: _Records,
) -> pathlib.Path:
  """Draws the learning curves and writes report.html, whose path it gives."""
  records = metrics.read_metrics(path / 'metrics.jsonl')
  sections = [
    html.Section(
      'Result',
      'Accuracies of the last step on the evaluation split, as shares; ema is '
      'that of the running mean of θ.',
      tables=[html.Table([dict(record) for record in results])],
    ),
    html.Section(
      'Published',
      'Top-1 accuracy on the validation images of ImageNet of networks trained '
      'with θ = φ, by this method and dense. The numbers of the paper on '
      'powerpropagation itself are not known to us.',
      tables=[html.Table(published(settings['method']))],
    ),
  ]
  drawn = [f for f in _CURVES if any(r.get(f) is not None for r in records)]
  if drawn:
    figure = _learning_curves(records, drawn, title, settings['alpha'])
    saved = plotting.save(figure, path / 'learning_curves.png')
    names = ', '.join(_CURVES[field] for field in drawn)
    alt = f'{names} against the training step'
    sections.append(
      html.Section(
        'Learning curves',
        'Training: means over the steps between two lines of the log, with the '
        'smoothed labels of the recipe. Top-5 and EMA are of the evaluation '
        'split; EMA is the running mean of θ.',
        figures=[html.Figure(saved, alt)],
      )
    )
  return html.write_report(
    path / 'report.html',
    title='ResNet-50 on ImageNet',
    subtitle=title,
    config=settings,
    sections=sections,
  )


def _learning_curves(
  records: _Records, drawn: Sequence[str], title: str, alpha: float
) -> Any:
  """A figure of what is logged, all of it over the same steps."""
  named = [
    {
      'alpha': alpha,
      'step': record['step'],
      **{_CURVES[field]: record[field] for field in drawn if field in record},
    }
    for record in records
  ]
  figure = plotting.learning_curves(
    named, fields=[_CURVES[field] for field in drawn], title=title
  )
  for axes in figure.axes:
    axes.set_xlim(0, 1.02 * max(record['step'] for record in records))
  return figure
