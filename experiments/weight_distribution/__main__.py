r"""How the weights of each layer are distributed, for several α.

Trains the one-hidden-layer MLP and two convolutional networks for every α, and
shows for each layer the histogram of its weights and the share of them near
zero, with test accuracies before and after one-shot pruning.

    python -m experiments.weight_distribution --out runs/weight_distribution

Expected, on the bundled digits: for each network, accuracies before pruning
within about three points of each other; more weights within 0.001 of zero for
α = 1.25 and 1.5 than for α = 1 in every layer, fewer again for α = 4, whose
latent weights φ lie in two heaps away from zero while its weights θ keep one
heap at zero. Between one and two minutes on two CPU cores.

The published comparison, on MNIST and on CIFAR-10, about ten minutes each:

    python -m experiments.weight_distribution --preset mnist \
        --data.dir ~/tensorflow_datasets --out runs/weights_mnist
    python -m experiments.weight_distribution --preset cifar10 \
        --data.dir ~/tensorflow_datasets --out runs/weights_cifar10

Each network has a folder of its own in --out, with its metrics and checkpoints;
--resume trains only what is missing. results.json holds three kinds of records,
all with net, alpha and key:

    scope, sparsity, density, accuracy, loss   after one-shot pruning
    leaf, size, epsilon, near_zero             share of weights with |θ| ≤ ε
    leaf, weights, peak, at_zero               where weights heap up: see _peaks

Source: Jain, Raj and Asgaonkar, Powerpropagation, 2022, section 3. Its recipes
are not given. Numbers: docs/results/weight_distribution.md.
"""

from collections.abc import Sequence
import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np

import experiments
from powerprop_jax import nets
from powerprop_jax.core import masks
from powerprop_jax.core.trees import Params, Tree
from powerprop_jax.files.tables import Row
from powerprop_jax.report import analysis, html, plotting, records
from powerprop_jax.train import ensemble, evaluate, loop, optimizers, step
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.ensemble import Members
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.optimizers import OptimizerConfig
from powerprop_jax.train.runs import divergence, errors, metrics, writers
from powerprop_jax.train.runs import report as run_report
from powerprop_jax.train.runs.contents import Contents, Networks
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.runs.folder import RunConfig, RunFolder
from powerprop_jax.train.step import TrainState

# Effective and latent weights, θ and φ, by α and key.
Weights = dict[tuple[float, int], tuple[Params, Params]]

_PROGRAM = 'weight_distribution'
_SCOPE = 'global'  # all layers of a network are ranked together
_SOURCE = 'Jain et al., 2022'
# Test accuracy by network and data set, then by α; where the report only says
# 'with powerpropagation', α is None.
_PUBLISHED: dict[tuple[str, str], dict[float | None, float]] = {
  ('mlp', 'mnist'): {1.0: 0.9764, 1.25: 0.9766, 1.5: 0.9754, 4.0: 0.9746},
  ('mnist_cnn', 'mnist'): {1.0: 0.98, None: 0.99},
  ('cifar_cnn', 'cifar10'): {1.0: 0.50, None: 0.58},
}


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
  """How the weights of each layer are distributed, for several α."""

  # Folder for the results; made if missing.
  out: str = 'runs/weight_distribution'
  # The data set.
  data: DataConfig = DataConfig()
  # The networks: lenet_300_100, lenet_5, mlp, mnist_cnn, cifar_cnn, alexnet_s.
  nets: tuple[str, ...] = ('mlp', 'mnist_cnn', 'cifar_cnn')
  # Powers to compare; 1 is the baseline.
  alphas: tuple[float, ...] = (1.0, 1.25, 1.5, 4.0)
  # Seeds of the initial weights and of the order of the data.
  keys: tuple[int, ...] = (0,)
  # The optimiser, the same for all networks. Adam, because SGD with momentum
  # diverges for α = 4 at step sizes that the smaller α need in so few steps.
  optimizer: OptimizerConfig = OptimizerConfig(
    name='adam', learning_rate=0.003, schedule='cosine'
  )
  # Lengths, the same for all networks.
  loop: LoopConfig = LoopConfig(
    num_steps=400, batch_size=60, eval_every=100, steps_per_dispatch=50
  )
  # Distances from zero below which weights are counted.
  epsilons: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
  # Shares of weights to keep in one-shot pruning.
  kept: tuple[float, ...] = (1.0, 0.5, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02)
  # Networks trained side by side; fewer need less memory. None: all.
  lanes_at_once: int | None = 1


PRESETS = {
  'digits': Config(),
  'mnist': Config(
    data=DataConfig('mnist'),
    nets=('mlp', 'mnist_cnn'),
    loop=LoopConfig(
      num_steps=5_000, batch_size=100, eval_every=250, steps_per_dispatch=50
    ),
  ),
  'cifar10': Config(
    data=DataConfig('cifar10'),
    nets=('cifar_cnn',),
    optimizer=OptimizerConfig(
      name='adam', learning_rate=0.002, schedule='cosine'
    ),
    loop=LoopConfig(
      num_steps=2_000, batch_size=100, eval_every=250, steps_per_dispatch=50
    ),
  ),
}


def main(config: Config) -> None:
  """Trains the networks, measures their weights, writes what came out."""
  _check(config)
  splits = data.load(config.data, show_progress=True)
  data.check_batch_size(config.loop.batch_size, len(splits.train.labels))
  networks = {name: nets.make(name, splits.num_classes) for name in config.nets}
  members = ensemble.product(config.alphas, config.keys)
  make_tx = lambda alpha: optimizers.make_tx(
    config.optimizer, alpha, config.loop.num_steps
  )
  # The update reads α from the state, so any α builds the same step.
  tx = make_tx(jnp.float32(1))
  for net in networks.values():
    # A power or an image size that does not fit is refused before any training.
    ensemble.create(net, make_tx, members, splits.example)
  folder = RunFolder(config.out, config, program=_PROGRAM, resume=config.resume)
  divergence.say_scale(splits)
  results: list[Row] = []
  sections = []
  lost: list[bool] = []
  for name, net in networks.items():
    part = RunFolder(
      folder.path / name,
      config,
      program=_PROGRAM,
      resume=folder.is_resumed,
      is_part=True,
      contents=Contents(
        Networks(
          name, config.data, config.loop.num_steps, config.alphas, config.keys
        )
      ),
    )
    print(f'\n{name} on {config.data.name}')
    state = loop.fit(
      ensemble.create(net, make_tx, members, splits.example),
      ensemble.mapped(step.make_advance(net, tx), config.lanes_at_once),
      ensemble.mapped(evaluate.on_state(net), config.lanes_at_once),
      splits,
      config.loop,
      part,
      indices=functools.partial(ensemble.batch_indices, members),
      records=functools.partial(ensemble.score_records, members),
      writers=writers.of_run(part, config),
    )
    weights = _weights_by_member(members, state)
    found = ensemble.prune(
      net,
      state,
      members,
      splits.test,
      [masks.density_to_sparsity(kept) for kept in config.kept],
      scope=_SCOPE,
    )
    found += _measure(config, weights)
    found = [{'net': name, **record} for record in found]
    sections.append(_section(config, folder, part, weights, found, splits))
    _print(config, found)
    lost += ensemble.say_diverged(members, state, part)
    part.mark_complete()
    results += found
  folder.write_results(results)
  run_report.write_page(
    folder.path,
    f'Weights of {", ".join(config.nets)} on {config.data.name}',
    f'α = {", ".join(f"{a:g}" for a in config.alphas)}, '
    f'keys {", ".join(map(str, config.keys))}',
    [_accuracy_section(config, results), *sections],
  )
  folder.mark_complete()
  print(f'\nFigures and report: {folder.path / "report.html"}')
  divergence.check_any_left(folder.path, lost)


def _check(config: Config) -> None:
  errors.check_positive(config, 'lanes_at_once', prefix='')
  errors.check_several(config, 'nets', 'alphas', 'keys')
  errors.check_several(config, 'epsilons', 'kept', differ=False)
  for kept in config.kept:
    masks.density_to_sparsity(kept, '--kept')
  for epsilon in config.epsilons:
    if not 0 < epsilon < float('inf'):
      raise UserError(
        f'--epsilons are distances from zero, positive, got {epsilon:g}.'
      )


def _weights_by_member(members: Members, state: TrainState) -> Weights:
  """The weights of every member, on the host."""
  stacked = jax.device_get(jax.jit(jax.vmap(lambda s: (s.theta, s.phi)))(state))
  return {
    (name['alpha'], name['key']): ensemble.take(stacked, index)
    for index, name in enumerate(ensemble.names(members))
  }


def _measure(config: Config, weights: Weights) -> list[Row]:
  """Records of the weights of one network: mass near zero, and heaps."""
  return [
    {'alpha': alpha, 'key': key, **record}
    for (alpha, key), (theta, phi) in weights.items()
    for record in [
      *analysis.fraction_near_zero(theta, config.epsilons),
      *_peaks(theta, 'theta'),
      *_peaks(phi, 'phi'),
    ]
  ]


def _peaks(tree: Tree, weights: str) -> list[Row]:
  """Where the weights of each leaf heap up, on either side of zero together.

  Of the histogram of |weight| in 16 bins over the range of nearly all weights:
  peak is the middle of the highest bin (0 for the first one), at_zero the
  height of the first bin over that of the highest. One heap at zero has
  at_zero near 1, two heaps away from zero have it near 0.
  """
  found = []
  histograms = analysis.weight_histograms({'': tree}, bins=31)['']
  for leaf, histogram in histograms.items():
    middles = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    # The bin around zero, the 16th of 31, is its own mirror image.
    heights = (histogram.counts + histogram.counts[::-1])[15:]
    highest = int(np.argmax(heights))
    # Of a diverged network no weight is finite, and NaN becomes null.
    at_zero = heights[0] / heights[highest] if heights[highest] else np.nan
    peak = abs(float(middles[15 + highest])) if highest else 0.0
    record = {'leaf': leaf, 'weights': weights, 'peak': peak}
    found.append({**record, 'at_zero': float(at_zero)})
  return found


def _section(
  config: Config,
  folder: RunFolder,
  part: RunFolder,
  weights: Weights,
  found: Sequence[Row],
  splits: data.Splits,
) -> html.Section:
  """Figures and tables of one network."""
  name = part.path.name
  title = f'{name} on {config.data.name}'
  first = {
    alpha: theta_and_phi
    for (alpha, key), theta_and_phi in weights.items()
    if key == config.keys[0]
  }
  latent = plotting.weight_histograms(
    analysis.weight_histograms({a: phi for a, (_, phi) in first.items()}),
    title=f'Latent weights after training, {title}',
  )
  for axes in latent.axes:
    if axes.get_xlabel():
      axes.set_xlabel('latent weight φ')
  figures = {
    'weight_histograms': plotting.weight_histograms(
      analysis.weight_histograms({a: theta for a, (theta, _) in first.items()}),
      title=f'Weights after training, {title}',
    ),
    'latent_histograms': latent,
    'near_zero': plotting.near_zero(
      [record for record in found if 'near_zero' in record], title=title
    ),
    'accuracy': plotting.accuracy_against_sparsity(
      [record for record in found if 'accuracy' in record],
      title=f'{title}, one-shot pruning, all layers ranked together',
      num_classes=splits.num_classes,
      published=_published_points(config, name),
    ),
    'learning_curves': plotting.learning_curves(
      metrics.read_metrics(part.metrics_path),
      fields=('loss', 'validation_accuracy'),
      title=title,
    ),
  }
  paths = {
    key: plotting.save(figure, folder.path / f'{key}_{name}')
    for key, figure in figures.items()
  }
  return html.Section(
    title,
    f'Histograms of key {config.keys[0]}. at_zero is the height of the '
    'histogram at zero over that of its peak: near 1 for one heap at zero, '
    'near 0 for two heaps away from it.',
    figures=[html.Figure(paths[k], f'{_ALT[k]}, {title}') for k in figures],
    tables=[
      html.Table(
        _near_zero_table(config, found),
        f'Share of weights with |θ| ≤ {_middle(config.epsilons):g}'
        f'{records.over_keys(len(config.keys))}.',
      ),
      *(
        html.Table(_peak_table(found, kind), f'at_zero of {words}.')
        for kind, words in (
          ('theta', 'the weights θ'),
          ('phi', 'the latent weights φ'),
        )
      ),
      html.Table(
        records.pivot([r for r in found if 'accuracy' in r]),
        'Test accuracy after one-shot pruning'
        f'{records.over_keys(len(config.keys))}.',
      ),
    ],
  )


_ALT = {
  'weight_histograms': 'histograms of the weights of each layer for each α',
  'latent_histograms': 'histograms of the latent weights of each layer',
  'near_zero': 'share of weights near zero for each α',
  'accuracy': 'test accuracy against sparsity',
  'learning_curves': 'loss and validation accuracy against the training step',
}


def _published_points(config: Config, name: str) -> list[Row]:
  """Published accuracies for the powers of this run, as points of a figure."""
  published = _PUBLISHED.get((name, config.data.name), {})
  return [
    {'alpha': a, 'sparsity': 0.0, 'accuracy': accuracy, 'label': _SOURCE}
    for a, accuracy in published.items()
    if a in config.alphas
  ]


def _middle(epsilons: Sequence[float]) -> float:
  """The distance of which tables speak."""
  return statistics.median_high(epsilons)


def _near_zero_table(config: Config, found: Sequence[Row]) -> list[Row]:
  epsilon = _middle(config.epsilons)
  of_epsilon = [r for r in found if r.get('epsilon') == epsilon]
  return records.pivot(of_epsilon, rows='leaf', value='near_zero')


def _peak_table(found: Sequence[Row], weights: str) -> list[Row]:
  of_weights = [r for r in found if r.get('weights') == weights]
  return records.pivot(of_weights, rows='leaf', value='at_zero')


def _accuracy_section(config: Config, results: Sequence[Row]) -> html.Section:
  """Test accuracies before pruning, the published ones beside them."""
  rows: list[Row] = []
  for name in config.nets:
    known = _PUBLISHED.get((name, config.data.name), {})
    ours = _accuracy_by_alpha(config, name, results)
    shown = [(f'{a:g}', ours[a], known.get(a)) for a in ours]
    powers = [accuracy for alpha, accuracy in ours.items() if alpha > 1]
    if None in known and powers:
      shown.append(('best α > 1', max(powers), known[None]))
    fields = ('α', 'test accuracy', 'published')
    rows += [
      {'network': name, **dict(zip(fields, row, strict=True))} for row in shown
    ]
  published = ''
  if any(row['published'] is not None for row in rows):
    published = (
      f' Published: {_SOURCE}, single runs whose recipes, and for the '
      'convolutional networks α, are not given.'
    )
  else:
    rows = [{n: v for n, v in r.items() if n != 'published'} for r in rows]
  return html.Section(
    'Test accuracy',
    f'Before pruning{records.over_keys(len(config.keys))}.{published}',
    tables=[html.Table(rows)],
  )


def _accuracy_by_alpha(
  config: Config, name: str, results: Sequence[Row]
) -> dict[float, float]:
  """Mean accuracy over keys at the largest share kept."""
  lowest = 1 - max(config.kept)
  of_net = [
    r for r in results if r['net'] == name and r.get('sparsity') == lowest
  ]
  by_alpha = records.group(of_net, 'alpha', 'accuracy')
  return {alpha: statistics.fmean(found) for alpha, found in by_alpha.items()}


def _print(config: Config, found: Sequence[Row]) -> None:
  """The tables of one network, on the standard output."""
  heading = ''.join(f'  α = {alpha:<4g}' for alpha in sorted(config.alphas))
  epsilon = _middle(config.epsilons)
  tables = {
    f'weights with |θ| ≤ {epsilon:g}': _near_zero_table(config, found),
    'height at zero over peak, θ': _peak_table(found, 'theta'),
    'height at zero over peak, φ': _peak_table(found, 'phi'),
    'test accuracy at sparsity': records.pivot(
      [r for r in found if 'accuracy' in r]
    ),
  }
  for title, rows in tables.items():
    print(f'\n  {title:28}{heading}')
    for row in rows:
      first, *rest = row.values()
      label = first if isinstance(first, str) else f'{first:.1%}'
      values = ''.join(f'  {np.nan if v is None else v:8.4f}' for v in rest)
      print(f'  {label:28}{values}')


if __name__ == '__main__':
  experiments.start(main, PRESETS)
