"""The program of continual learning writes what it promises, also in pieces."""

import functools

import numpy as np
import plots
import programs
import pytest

from experiments.continual_permuted import __main__ as continual_permuted
from experiments.continual_permuted import figures, report, streams
from experiments.continual_permuted.config import PRESETS
from powerprop_jax.train.cli import main as cli
from powerprop_jax.train.data.splits import DataConfig

ARGS = [
  *('--net.hidden', '16', '--net.epochs=2'),
  *('--packing.densities', '0.2', '0.5'),
  *('--methods', 'efficient_packnet', 'fine_tuning', 'joint'),
  *('--alphas', '1', '1.5', '--rates', '0.1', '0.05', '--keys', '0', '1'),
]
run = functools.partial(programs.run, continual_permuted)
# Three methods, with two α and two keys.
finished = programs.finished(continual_permuted, ARGS)


@pytest.mark.slow
def test_a_run_writes_everything_it_promises(finished):
  figures = 'accuracy.png capacity.png weights_efficient_packnet.png'
  programs.assert_written(finished, f'table.md {figures}')
  found = programs.results(finished)
  runs = list(dict.fromkeys((r['method'], r['alpha'], r['key']) for r in found))
  ways = [('efficient_packnet', 1.0), ('efficient_packnet', 1.5)]
  ways += [('fine_tuning', 1.0), ('joint', 1.0)]
  assert runs == [(*way, key) for way in ways for key in (0, 1)]
  for place in runs:
    own = [r for r in found if (r['method'], r['alpha'], r['key']) == place]
    entries = [r for r in own if 'task' in r and r['tasks_learned'] > 0]
    assert {r['task'] for r in entries} == {1, 2, 3}
    assert all(0 <= r['accuracy'] <= 1 for r in entries)
    (summary,) = [r for r in own if 'num_tasks' in r]
    last = [r['accuracy'] for r in entries if r['tasks_learned'] == 3]
    average = np.mean(last[:3])
    assert summary['average_accuracy'] == pytest.approx(average)
    used = [r['capacity_used'] for r in own if 'capacity_used' in r]
    assert len(used) == (3 if place[0] == 'efficient_packnet' else 0)
    assert used == sorted(used)


@pytest.mark.slow
def test_a_report_is_made_again_and_an_export_says_what_to_do(
  finished, tmp_path, capsys
):
  programs.assert_reported_again(finished)
  part = finished / 'combinations' / 'joint_alpha_1_key_0'
  for run in (finished, part):
    status = cli.main(['export', str(run), '--out', str(tmp_path / 'x')])
    assert 'approach.params of' in programs.error(status, capsys)


def test_table_has_a_row_for_every_method_and_alpha(finished):
  rows = report.table(programs.results(finished))
  assert [(row['method'], row['α']) for row in rows] == [
    *(('EfficientPackNet', '1'), ('EfficientPackNet', '1.5')),
    *(('fine-tuning', '1'), ('all at once', '1')),
  ]
  assert rows[0]['forgetting'] == '0.00 ± 0.00'
  assert rows[3]['forgetting'] is None
  assert rows[2]['capacity used'] is None


@pytest.mark.slow
def test_workers_and_resuming_give_the_same_results(finished, tmp_path):
  out = tmp_path / 'run'
  args = [*ARGS, '--methods', 'fine_tuning', '--keys', '0', '--out', out]
  assert run(*args, '--workers', 2) == 0
  expected = [
    r
    for r in programs.results(finished)
    if (r['method'], r['key']) == ('fine_tuning', 0)
  ]
  found = programs.results(out)
  assert [r.get('task') for r in found] == [r.get('task') for r in expected]
  assert run(*args, '--workers', 1, '--resume') == 0
  assert programs.results(out) == found


@pytest.mark.parametrize('kind', ['rotated', 'split'])
def test_other_streams_of_the_digits(kind):
  config = streams.StreamConfig(kind, num_tasks=5)
  stream = streams.load(config, DataConfig())
  assert len(stream) == 5
  assert {task.shape for task in stream} == {(8, 8, 1)}
  assert sum(task.size('train') for task in stream) == (
    1197 if kind == 'split' else 5 * 1197
  )


@pytest.mark.slow
def test_a_sequence_of_different_data(tfds_dir):
  config = PRESETS['sequence']
  stream = streams.load(config.stream, DataConfig(dir=tfds_dir))
  assert [task.id for task in stream] == ['mnist', 'digits', 'cifar10']
  assert {task.shape for task in stream} == {(28, 28, 1)}
  image = stream[1].test.images[0]
  # Digits of 8×8, three times as large, with a margin of two.
  assert image[:2].max() == image[-2:].max() == 0
  assert image.max() > 0.5


def entries(method, tasks_learned, task, accuracy=0.8):
  place = {'method': method, 'tasks_learned': tasks_learned, 'task': task}
  return {**place, 'accuracy': accuracy}


def test_figures_choose_a_few_of_many_tasks():
  records = [
    entries('ewc', i, j, 0.5 + j / 50)
    for i in range(1, 21)
    for j in range(1, i + 1)
  ]
  figure = figures.accuracy_over_tasks(records, title='many')
  first, second, *others = plots.titles(figure)
  assert (first, second) == ('mean of the tasks so far', 'task 1')
  assert len(others) == 7 and others[-1] == 'task 20'
  mean = figure.axes[0].lines[0].get_ydata()
  assert mean[-1] == pytest.approx(0.5 + np.mean(np.arange(1, 21)) / 50)


def test_what_is_measured_at_the_end_is_a_level():
  records = [entries('joint', 2, 1), entries('ewc', 1, 1), entries('ewc', 2, 1)]
  figure = figures.accuracy_over_tasks(records)
  dotted = [x for x in figure.axes[1].lines if x.get_linestyle() == ':']
  assert len(dotted) == 1


def test_figures_refuse_records_of_something_else():
  for draw in (figures.accuracy_over_tasks, figures.capacity):
    with pytest.raises(ValueError, match='tasks_learned'):
      draw([{'loss': 1.0}])
