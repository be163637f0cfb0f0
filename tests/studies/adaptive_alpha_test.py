import pathlib
import tempfile

from absl.testing import parameterized
import numpy as np
import programs
import pytest

from experiments.adaptive_alpha import __main__ as adaptive_alpha
from experiments.adaptive_alpha import report, runs
from experiments.adaptive_alpha.config import Config
from powerprop_jax.train.runs.errors import UserError


def _run(*args):
  return programs.run(adaptive_alpha, '--preset', 'tiny', *args)


class AdaptiveAlphaTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.out = pathlib.Path(folder.name) / 'run'

  @pytest.mark.slow
  def test_a_run_writes_everything_and_is_not_done_again(self):
    methods = ('fixed', 'per_leaf', 'branch')
    args = ('--methods', *methods, '--alphas', '2', '--out', self.out)
    self.assertEqual(_run(*args), 0)
    figures = ('alpha', 'near_zero', 'accuracy', 'weights_fixed', 'weights')
    names = [f'{name}.png' for name in figures]
    names += ['table.md', 'report.html', 'config.json', 'complete.json']
    names += ['combinations/mlp_branch/rung_1/metrics.jsonl']
    for name in names:
      self.assertGreater((self.out / name).stat().st_size, 0, name)
    results = programs.results(self.out)
    ways = {('fixed', 2.0)}
    ways |= {(method, None) for method in methods[1:]}
    self.assertEqual({(r['method'], r['alpha']) for r in results}, ways)
    for way in ways:
      of_way = [r for r in results if (r['method'], r['alpha']) == way]
      count = lambda field, of_way=of_way: sum(field in r for r in of_way)
      # Two shares kept.
      self.assertEqual(count('sparsity'), 2)
      # Both leaves and the total, for each distance.
      self.assertEqual(count('epsilon'), 3 * 4)
      (end,) = (record for record in of_way if 'own_steps' in record)
      self.assertEqual(end['steps'], 16)
      self.assertEqual(end['own_steps'], 13 if way[0] == 'branch' else 16)
      self.assertEqual('power' in end, way[0] != 'per_leaf')
    layers = {r['leaf'] for r in results if 'power' in r and 'leaf' in r}
    self.assertEqual(layers, {'total', 'mlp/linear_0/w', 'mlp/logits/w'})
    raced = [r for r in results if 'candidate' in r]
    self.assertEqual(sum(r['survives'] for r in raced), 1)
    self.assertLen(raced, 2)

    before = {p: p.stat().st_mtime_ns for p in self.out.rglob('metrics.jsonl')}
    (self.out / 'report.html').unlink()
    # An unfinished race goes on from its last rung.
    (self.out / 'combinations' / 'mlp_branch' / 'complete.json').unlink()
    self.assertEqual(_run(*args, '--resume'), 0)
    self.assertEqual(programs.results(self.out), results)
    self.assertTrue((self.out / 'report.html').exists())
    after = {p: p.stat().st_mtime_ns for p in before}
    changed = {p.parent.name for p in before if after[p] != before[p]}
    self.assertEqual(changed, {'mlp_branch'})

  def test_weights_of_an_earlier_version_are_refused_in_one_line(self):
    combination = runs.Combination('mlp', 'race', None)
    folder = self.out / 'combinations' / combination.name
    folder.mkdir(parents=True)
    np.savez(folder / 'weights.npz', **{'mlp/logits/w': np.ones(2)})
    with self.assertRaisesRegex(
      UserError, r'weights.npz: .*of version 0\.1\.0'
    ):
      runs.read_weights(Config(out=str(self.out)), combination)


class ReportTest(parameterized.TestCase):
  def test_the_race_is_measured_against_the_best_fixed_power(self):
    record = {'method': 'fixed', 'sparsity': 0.95, 'key': 0}
    records = [
      {**record, 'alpha': 1.0, 'accuracy': 0.5},
      {**record, 'alpha': 2.0, 'accuracy': 0.9},
      {**record, 'alpha': 2.0, 'accuracy': 0.8, 'key': 1},
      # Better, but at another share.
      {**record, 'alpha': 3.0, 'accuracy': 1.0, 'sparsity': 0.5},
      {**record, 'alpha': None, 'method': 'race', 'accuracy': 0.848},
    ]
    self.assertEqual(report.best_fixed(records, 0.05), 2.0)
    first, second = report.verdicts(records, 0.05)
    self.assertIn('best fixed power is 2, with 85.00%', first)
    self.assertEqual(
      second, 'race: 84.80%, -0.20 points against the best fixed power.'
    )

  def test_what_is_mechanical_is_a_share_of_the_gain(self):
    record = {'method': 'published_phi', 'alpha': None, 'own_steps': 9}
    rows = report.artefact_table(
      [
        {**record, 'near_zero': 0.3, 'gain': 0.2, 'mechanical': 0.1},
        {**record, 'near_zero': 0.5, 'gain': 0.4, 'mechanical': 0.2},
        {**record, 'near_zero': None, 'gain': None, 'mechanical': 0.0},
      ]
    )
    self.assertLen(rows, 1)
    self.assertEqual(rows[0]['gain'], '30.00 ± 14.14')
    self.assertEqual(rows[0]['near zero'], '40.00 ± 14.14')
