"""Page and published numbers of experiments/imagenet_resnet50."""

import pathlib

from experiments.imagenet_resnet50.config import Config
from powerprop_jax.files.tables import Row
from powerprop_jax.train.runs import contents
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Figure, Page, Section
from powerprop_jax.train.runs.folder import RunFolder

# What is drawn of what is logged.
_CURVES = [
  *('loss', 'validation_loss', 'images_per_second', 'accuracy'),
  *('validation_accuracy', 'validation_top_5', 'validation_accuracy_ema'),
]

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


def page(title: str) -> Page:
  """What the page of a run shows."""
  curves = Figure(
    'learning_curves',
    'what is logged, against the training step',
    'learning_curves',
    contents.Records('metrics.jsonl', settings={'alpha': 'alpha'}),
    {'fields': _CURVES, 'title': title},
  )
  sections = (
    Section(
      'Result',
      'Accuracies of the last step on the evaluation split, as shares; ema is '
      'that of the running mean of θ.',
      tables=(contents.Table(),),
    ),
    Section(
      'Published',
      'Top-1 accuracy on the validation images of ImageNet of networks trained '
      'with θ = φ, by this method and dense. The numbers of the paper on '
      'powerpropagation itself are not known to us.',
      tables=(contents.table_of('published'),),
    ),
    Section(
      'Learning curves',
      'Training: means over the steps between two lines of the log, with the '
      'smoothed labels of the recipe. Top-5 and EMA are of the evaluation '
      'split; EMA is the running mean of θ.',
      (curves,),
    ),
  )
  what, _, how = title.partition(', ')
  return Page(what, how, sections)


def is_comparable(config: Config) -> bool:
  """Whether what is published is of this network and these images.

  Example:
    >>> is_comparable(Config()), is_comparable(Config(net=NetConfig(depth=18)))
    (True, False)
  """
  is_imagenet = config.data.name.startswith('imagenet2012')
  is_whole = config.net.depth == 50 and config.net.width == 1
  return is_imagenet and is_whole and not config.data.synthetic


def write(folder: RunFolder, config: Config) -> pathlib.Path:
  """Writes report.html, whose path it gives, and what it shows."""
  if is_comparable(config):
    folder.write_json('published.json', published(config.method))
  return run_report.write(folder.path)
