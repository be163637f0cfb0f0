"""The study of changing α: its program and its report."""

import numpy as np
import programs
import pytest

from experiments.adaptive_alpha import __main__ as adaptive_alpha
from experiments.adaptive_alpha import report, runs
from experiments.adaptive_alpha.config import Config
from powerprop_jax.train.runs.errors import UserError


def _run(*args):
  return programs.run(adaptive_alpha, '--preset', 'tiny', *args)


@pytest.mark.slow
def test_a_run_writes_everything_and_is_not_done_again(tmp_path):
  out = tmp_path / 'run'
  methods = ('fixed', 'per_leaf', 'branch')
  args = ('--methods', *methods, '--alphas', '2', '--out', out)
  assert _run(*args) == 0
  figures = 'alpha.png near_zero.png accuracy.png weights_fixed.png weights.png'
  raced = 'combinations/mlp_branch/rung_1/metrics.jsonl'
  programs.assert_written(out, f'{figures} table.md {raced}')
  results = programs.results(out)
  ways = {('fixed', 2.0)}
  ways |= {(method, None) for method in methods[1:]}
  assert {(r['method'], r['alpha']) for r in results} == ways
  for way in ways:
    of_way = [r for r in results if (r['method'], r['alpha']) == way]
    count = lambda field, of_way=of_way: sum(field in r for r in of_way)
    # Two shares kept.
    assert count('sparsity') == 2
    # Both leaves and the total, for each distance.
    assert count('epsilon') == 3 * 4
    (end,) = (record for record in of_way if 'own_steps' in record)
    assert end['steps'] == 16
    assert end['own_steps'] == (13 if way[0] == 'branch' else 16)
    assert ('power' in end) == (way[0] != 'per_leaf')
  layers = {r['leaf'] for r in results if 'power' in r and 'leaf' in r}
  assert layers == {'total', 'mlp/linear_0/w', 'mlp/logits/w'}
  raced = [r for r in results if 'candidate' in r]
  assert sum(r['survives'] for r in raced) == 1
  assert len(raced) == 2

  # A race lies in its last rung, which is the only one that can be exported.
  for record in results:
    if record.get('sparsity') == 0:
      name = f'mlp_{record["method"]}'
      part = out / 'combinations' / (name + '_2' * (name == 'mlp_fixed'))
      found = programs.exported(part, tmp_path / name)
      assert found.about['test']['accuracy'] == record['accuracy']
  programs.assert_reported_again(out)

  times = lambda: [
    (path.parent.name, time)
    for path, time in programs.times(out).items()
    if path.name == 'metrics.jsonl'
  ]
  before = times()
  (out / 'report.html').unlink()
  # An unfinished race goes on from its last rung.
  (out / 'combinations' / 'mlp_branch' / 'complete.json').unlink()
  assert _run(*args, '--resume') == 0
  assert programs.results(out) == results
  assert (out / 'report.html').exists()
  assert {name for name, _ in set(times()) - set(before)} == {'mlp_branch'}


def test_weights_of_an_earlier_version_are_refused_in_one_line(tmp_path):
  combination = runs.Combination('mlp', 'race', None)
  folder = tmp_path / 'combinations' / combination.name
  folder.mkdir(parents=True)
  np.savez(folder / 'weights.npz', **{'mlp/logits/w': np.ones(2)})
  with pytest.raises(UserError, match=r'weights.npz: .*of version 0\.1\.0'):
    runs.read_weights(Config(out=str(tmp_path)), combination)


def test_the_race_is_measured_against_the_best_fixed_power():
  record = {'method': 'fixed', 'sparsity': 0.95, 'key': 0}
  records = [
    {**record, 'alpha': 1.0, 'accuracy': 0.5},
    {**record, 'alpha': 2.0, 'accuracy': 0.9},
    {**record, 'alpha': 2.0, 'accuracy': 0.8, 'key': 1},
    # Better, but at another share.
    {**record, 'alpha': 3.0, 'accuracy': 1.0, 'sparsity': 0.5},
    {**record, 'alpha': None, 'method': 'race', 'accuracy': 0.848},
  ]
  assert report.best_fixed(records, 0.05) == 2.0
  first, second = report.verdicts(records, 0.05)
  assert 'best fixed power is 2, with 85.00%' in first
  assert second == 'race: 84.80%, -0.20 points against the best fixed power.'


def test_what_is_mechanical_is_a_share_of_the_gain():
  record = {'method': 'published_phi', 'alpha': None, 'own_steps': 9}
  rows = report.artefact_table(
    [
      {**record, 'near_zero': 0.3, 'gain': 0.2, 'mechanical': 0.1},
      {**record, 'near_zero': 0.5, 'gain': 0.4, 'mechanical': 0.2},
      {**record, 'near_zero': None, 'gain': None, 'mechanical': 0.0},
    ]
  )
  (row,) = rows
  assert (row['gain'], row['near zero']) == ('30.00 ± 14.14', '40.00 ± 14.14')
