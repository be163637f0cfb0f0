"""Tables, figures and page of experiments/adaptive_alpha."""

from collections.abc import Mapping, Sequence
import statistics

from experiments.adaptive_alpha import figures as plots
from experiments.adaptive_alpha.config import Config
from experiments.adaptive_alpha.runs import Combination
from experiments.common import tables
from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core.trees import Params
from powerprop_jax.files import whole
from powerprop_jax.files.tables import Row
from powerprop_jax.report import analysis
from powerprop_jax.report import records as records_lib
from powerprop_jax.report.plotting import style
from powerprop_jax.report.plotting import weights as weight_plots
from powerprop_jax.train.runs import contents, divergence
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Figure, Page, Section
from powerprop_jax.train.runs.folder import RunFolder

_Records = Sequence[Row]
# A method, and its α if that is fixed.
_Way = tuple[str, float | None]


def write(
  folder: RunFolder,
  config: Config,
  results: _Records,
  weights: Mapping[Combination, Params],
) -> None:
  """Prints the tables; writes them, the figures and report.html.

  results are the records of results.json, weights trees of the first key.
  """
  text = ''
  for net in config.nets:
    of_net = [record for record in results if record['net'] == net]
    title = f'{net} on {config.data.name}'
    shown = {
      'table': accuracy_table(of_net, config.kept),
      'artefact': artefact_table(of_net),
    }
    notes = verdicts(of_net, config.race.kept)
    text += f'## {title}\n\n'
    for name, caption in _captions(config).items():
      text += f'{caption}\n\n{tables.markdown(shown[name])}\n'
    text += ''.join(f'{note}\n\n' for note in notes)
    shown['verdicts'] = [{'in words': note} for note in notes]
    for name, rows in shown.items():
      folder.write_json(f'{_file_name(config, net, name)}.json', rows)
    figures = _figures(
      title,
      config,
      of_net,
      {(m, a): tree for (n, m, a), tree in weights.items() if n == net},
    )
    for name, figure in figures.items():
      style.save(figure, folder.path / _file_name(config, net, name))
  whole.write_bytes(folder.path / 'table.md', text.encode())
  print(f'\n{text}', end='')
  run_report.write(folder.path)


def page(config: Config) -> Page:
  """What the page of a run shows: a section for each network."""
  sections = []
  for net in config.nets:
    title = f'{net} on {config.data.name}'
    figures = (
      Figure(_file_name(config, net, name), f'{alt}, {title}')
      for name, alt in _ALT.items()
    )
    shown = (
      contents.table_of(_file_name(config, net, name), caption)
      for name, caption in {'verdicts': '', **_captions(config)}.items()
    )
    section = Section(title, _ON_HISTOGRAMS, tuple(figures), tuple(shown))
    sections.append(section)
  title = f'Choosing α of {", ".join(config.nets)} on {config.data.name}'
  return Page(title, ', '.join(config.methods), tuple(sections))


def _captions(config: Config) -> dict[str, str]:
  return {
    'table': 'Test accuracy in per cent by the share of weights kept'
    f'{records_lib.over_keys(len(config.keys), spread=True)}.',
    'artefact': f'Weights with |θ| < {config.control.epsilon:g} at the end, in '
    'per cent; gain: by how many points that share grew; mechanical: what the '
    'changes of α added to it by themselves.',
  }


_ON_HISTOGRAMS = (
  'Histograms show the weights of the first key; networks that diverged are '
  'left out.'
)
_ALT = {
  'alpha': 'α of each method against the training step',
  'near_zero': 'share of weights near zero against the training step',
  'accuracy': 'test accuracy against the share of weights left',
  'weights_fixed': 'histograms of the weights of each layer for fixed powers',
  'weights': 'histograms of the weights of each layer for the other methods',
}


def _file_name(config: Config, net: str, name: str) -> str:
  return name if len(config.nets) == 1 else f'{name}_{net}'


def accuracy_table(results: _Records, kept: Sequence[float]) -> list[Row]:
  """A row for each way to choose α, with its accuracy at each share kept.

  Training steps are those of all networks of a race together, own steps those
  of the network that is left.

  Example:
    >>> record = {'method': 'race', 'alpha': None, 'key': 0}
    >>> rows = accuracy_table([
    ...   {**record, 'sparsity': 0.95, 'accuracy': 0.9},
    ...   {**record, 'steps': 100, 'own_steps': 73, 'power': 2.0}], [0.05])
    >>> rows[0]['method'], rows[0]['α at the end'], rows[0]['5 %']
    ('race', '2', '90.00')
  """
  rows = []
  for way in _ways(results):
    of_way = _of(results, way)
    ends = [record for record in of_way if 'own_steps' in record]
    powers = [r['power'] for r in ends if records_lib.is_finite(r.get('power'))]
    row: Row = {
      'method': plots.name_of(*way),
      'training steps': str(ends[0]['steps']),
      'own steps': str(ends[0]['own_steps']),
      'α at the end': ', '.join(f'{power:.4g}' for power in powers),
    }
    if way[1] is not None:
      row['α at the end'] = f'{way[1]:g}'
    for share in kept:
      row[f'{100 * share:g} %'] = tables.mean_and_deviation(
        _accuracies(of_way, share)
      )
    rows.append(row)
  return rows


def artefact_table(results: _Records) -> list[Row]:
  """A row for each way: the growth of the near-zero mass, what is mechanical.

  When φ is kept, every change of α moves all weights, with no training. What
  these moves add to the share of weights near zero, summed over all control
  points, is mechanical; training may undo a part of it, so that it can be more
  than the whole.
  """
  rows = []
  for way in _ways(results):
    ends = [r for r in _of(results, way) if 'own_steps' in r]
    of = lambda name, ends=ends: [
      r[name] for r in ends if records_lib.is_finite(r[name])
    ]
    gains, jumps = of('gain'), of('mechanical')
    share = None
    # Of a gain near nothing a share says nothing.
    if gains and statistics.fmean(gains) > 0.01:
      share = f'{statistics.fmean(jumps) / statistics.fmean(gains):.0%}'
    rows.append(
      {
        'method': plots.name_of(*way),
        'near zero': tables.mean_and_deviation(of('near_zero')),
        'gain': tables.mean_and_deviation(gains),
        'mechanical': tables.mean_and_deviation(jumps),
        'share': share,
      }
    )
  return rows


def verdicts(results: _Records, kept: float) -> list[str]:
  """Sentences on who is best after pruning to the target of the race.

  There is none if that share was not measured.
  """
  best = best_fixed(results, kept)
  if best is None:
    return []
  means = {
    way: statistics.fmean(accuracies)
    for way in _ways(results)
    if (accuracies := _accuracies(_of(results, way), kept))
  }
  top = means['fixed', best]
  sentences = [
    f'With {100 * kept:g} % of the weights kept the best fixed power is '
    f'{best:g}, with {top:.2%}; the races are not told.'
  ]
  sentences += [
    f'{plots.name_of(*way)}: {mean:.2%}, {100 * (mean - top):+.2f} points '
    'against the best fixed power.'
    for way, mean in means.items()
    if way[1] is None
  ]
  return [*sentences, *_on_the_artefact(results)]


def _on_the_artefact(results: _Records) -> list[str]:
  """What of the published rule's gain comes from keeping φ."""
  rows = {row['method']: row for row in artefact_table(results) if row['gain']}
  sentences = []
  if row := rows.get(plots.name_of('published_theta')):
    sentences.append(
      f'Published rule, θ kept: they grew by {row["gain"]} points.'
    )
  if row := rows.get(plots.name_of('published_phi')):
    sentences.append(
      f'Published rule, φ kept: of {row["gain"]} points by which the weights '
      f'near zero grew, {row["mechanical"]} came with the changes of α, '
      'without any training.'
    )
  return sentences


def best_fixed(results: _Records, kept: float) -> float | None:
  """The fixed power with the highest mean accuracy at a share kept.

  The smallest of equals; None if nothing was measured there.

  Example:
    >>> best_fixed([{'method': 'fixed', 'alpha': a, 'sparsity': 0.95, 'key': 0,
    ...              'accuracy': a / 10} for a in (1.0, 2.0)], 0.05)
    2.0
  """
  means = {
    alpha: statistics.fmean(accuracies)
    for method, alpha in _ways(results)
    if alpha is not None
    and (accuracies := _accuracies(_of(results, (method, alpha)), kept))
  }
  return max(sorted(means), key=lambda alpha: means[alpha]) if means else None


def _ways(results: _Records) -> list[_Way]:
  return list(dict.fromkeys((r['method'], r['alpha']) for r in results))


def _of(results: _Records, way: _Way) -> _Records:
  return [r for r in results if (r['method'], r['alpha']) == way]


def _accuracies(results: _Records, kept: float) -> list[float]:
  """Of all keys; a diverged network counts as wrong everywhere."""
  sparsity = masks_lib.density_to_sparsity(kept)
  return [r['accuracy'] for r in results if r.get('sparsity') == sparsity]


def _figures(
  title: str, config: Config, results: _Records, weights: Mapping[_Way, Params]
) -> Row:
  logged = [record for record in results if 'step' in record]
  moving = [r for r in logged if r['alpha'] is None and 'power' in r]
  epsilon = config.control.epsilon
  figures = {}
  if moving:
    figures['alpha'] = plots.alpha_over_steps(
      moving,
      title=f'Power α while training, {title}',
      cap=config.control.alpha_max,
    )
  figures['near_zero'] = plots.near_zero_over_steps(
    [record for record in logged if 'near_zero' in record],
    title=f'Weights near zero, {title}',
    epsilon=epsilon,
  )
  figures['accuracy'] = plots.accuracy_by_method(
    [record for record in results if 'sparsity' in record],
    title=f'One-shot pruning, all layers ranked together, {title}',
    best=best_fixed(results, config.race.kept),
  )
  # One weight of a network that diverged would stretch the axes of all.
  finite = {
    way: tree
    for way, tree in weights.items()
    if divergence.lost_leaf(tree) is None
  }
  fixed = {a: tree for (_, a), tree in finite.items() if a is not None}
  others = {m: tree for (m, a), tree in finite.items() if a is None}
  if fixed:
    figures['weights_fixed'] = weight_plots.weight_histograms(
      analysis.weight_histograms(fixed), title=f'Weights, fixed α, {title}'
    )
  if others:
    numbered = analysis.weight_histograms(dict(enumerate(others.values())))
    figures['weights'] = plots.histograms_by_method(
      dict(zip(others, numbered.values(), strict=True)),
      title=f'Weights, {title}',
    )
  return figures
