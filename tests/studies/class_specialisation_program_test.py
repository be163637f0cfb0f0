"""The comparison of features writes what it promises."""

import collections

import programs
import pytest

from experiments.class_specialisation import __main__ as class_specialisation
from experiments.class_specialisation import report

TINY = [
  *('--net=mlp', '--density=0.2', '--methods', 'dense', 'set'),
  *('--loop.num-steps=6', '--loop.batch-size=8', '--loop.eval-every=6'),
  *('--loop.steps-per-dispatch=6', '--sparse.period=2'),
]
# The dense network and SET, for two keys.
finished = programs.finished(class_specialisation, TINY)


@pytest.mark.slow
def test_a_run_writes_everything_it_promises(finished):
  programs.assert_written(finished, 'class_specialisation.png')
  found = programs.results(finished)
  scored = [r for r in found if 'accuracy' in r]
  assert [(r['method'], r['density'], r['key']) for r in scored] == [
    (method, density, key)
    for method, density in (('dense', 1.0), ('set', 0.2))
    for key in (0, 1)
  ]
  for record in scored:
    assert abs(record['density_measured'] - record['density']) < 2e-3


def test_every_feature_has_a_share_between_that_of_chance_and_one(finished):
  of_features = [r for r in programs.results(finished) if 'feature' in r]
  counts = collections.Counter(
    (r['method'], r['key'], r['layer']) for r in of_features
  )
  # The networks differ in their masks only, and have the same features.
  assert len(counts) == 2 * 2 * 2
  assert {name for _, _, name in counts} == {'logits', 'output'}
  assert counts['set', 0, 'logits'] > counts['set', 0, 'output'] == 10
  shares = [r['specialisation'] for r in of_features]
  known = [share for share in shares if share is not None]
  assert len(known) > len(shares) / 2
  assert 0.1 - 1e-6 <= min(known) <= max(known) <= 1


def test_what_is_finished_is_not_trained_again(finished):
  folder = 'set_density_0.2_alpha_1/checkpoints'
  programs.assert_resumes_to_the_same(
    class_specialisation, TINY, finished, folder
  )


def test_means_are_those_of_keys_not_of_their_features():
  records = [
    {'layer': layer, 'method': 'set', 'key': key, 'specialisation': share}
    for layer in ('net/a', 'net/b')
    for key, shares in enumerate(([0.2, 0.2, 0.2], [0.4, None]))
    for share in shares
  ]
  rows = report.mean_by_layer(records)
  words = '0.3000 ± 0.1414'
  assert rows == [{'layer': 'a', 'set': words}, {'layer': 'b', 'set': words}]
