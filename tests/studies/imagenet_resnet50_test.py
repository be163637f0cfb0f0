"""The program for ImageNet at a tiny size: train, stop, resume, evaluate."""

import dataclasses
import functools
import itertools
import json
import re

import chex
import jax
import numpy as np
import processes
import programs
import pytest

from experiments.imagenet_resnet50 import __main__ as imagenet_resnet50
from experiments.imagenet_resnet50 import report, setup
from experiments.imagenet_resnet50 import run as image_run
from experiments.imagenet_resnet50.config import (
  METHODS,
  PRESETS,
  Config,
  NetConfig,
  from_identity,
  identity,
)
from powerprop_jax import nets
from powerprop_jax.core import masks
from powerprop_jax.export import export
from powerprop_jax.train import methods
from powerprop_jax.train import step as step_lib
from powerprop_jax.train.cli import main as cli
from powerprop_jax.train.cli import pruned_model
from powerprop_jax.train.images.sources import ImagesConfig
from powerprop_jax.train.runs import metrics as metrics_lib

ONE_DEVICE = ['--mesh.devices', '1']
TINY = ['--preset', 'tiny', *ONE_DEVICE]
SYNTHETIC = [*TINY, '--data.synthetic', '--data.synthetic-classes', '10']


@pytest.fixture(scope='module', autouse=True)
def _compiled_once(tmp_path_factory):
  """Runs of the same settings take what the first one compiled."""
  settings = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
    'jax_persistent_cache_min_compile_time_secs': 0.1,
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


run = functools.partial(programs.run, imagenet_resnet50)


def result(out):
  [record] = programs.results(out)
  return record


class PresetsTest:
  def test_there_is_one_for_each_cell_of_the_table(self):
    sparse = [m for m in METHODS if m != 'dense']
    names = itertools.product(sparse, ('80', '90', '95'), ('uniform', 'erk'))
    plain = {'dense', *map('_'.join, names)}
    expected = {'tiny', *plain, *(f'{name}_powerprop' for name in plain)}
    assert set(PRESETS) == expected

  def test_names_say_what_they_are(self):
    config = PRESETS['rigl_90_erk_powerprop']
    place = config.method, config.sparsity, config.allocation
    assert place == ('rigl', 0.9, 'erk') and config.alpha > 1
    assert PRESETS['rigl_90_erk'] == dataclasses.replace(config, alpha=1.0)
    recipe = config.recipe
    assert (recipe.batch_size, recipe.num_steps) == (4096, 32_000)
    assert round(config.sparse.stop * recipe.num_steps) == 25_000

  @pytest.mark.parametrize('name', [n for n in PRESETS if '_90_' in n])
  @pytest.mark.slow
  def test_every_method_fits_the_real_network(self, name):
    config = PRESETS[name]
    theta = setup.shapes(setup.make_net(NetConfig(), 1000), 224)
    tx = setup.make_tx(config, 1_281_167, theta)
    state = jax.eval_shape(tx.init, theta)
    slots = sum(x.size for x in jax.tree.leaves(state) if x.dtype == np.float32)
    assert slots >= 25_557_032

  def test_settings_come_back_from_a_file(self):
    for config in PRESETS.values():
      stored = json.loads(json.dumps(identity(config)))
      here = Config(data=dataclasses.replace(config.data, workers=3))
      found = from_identity(stored, here)
      assert identity(found) == identity(config)
      assert found.data.workers == 3

  def test_published_numbers_stand_beside_ours(self):
    found = {
      (r['sparsity'], r['allocation'], r['length']): r['accuracy']
      for r in report.published('rigl')
    }
    assert found[0.9, 'erk', 1] == 0.73 and found[0.95, 'uniform', 5] == 0.731
    assert found[0.0, None, 1] == 0.768


# A run on random images.
finished = programs.finished(imagenet_resnet50, SYNTHETIC)


@pytest.mark.slow
class RunTest:
  def test_everything_promised_is_there(self, finished):
    files = 'metrics.jsonl best.npz learning_curves.png'
    programs.assert_written(finished, files)
    record = result(finished)
    assert record['step'] == 8 and record['num_skipped'] == 0
    assert record['loss'] > 0
    assert record['density'] == pytest.approx(_expected_density())
    records = metrics_lib.read_metrics(finished / 'metrics.jsonl')
    evaluated = [r['step'] for r in records if 'validation_accuracy' in r]
    assert evaluated == [4, 8]
    page = (finished / 'report.html').read_text()
    assert '<h1>ResNet-10 on random images</h1>' in page
    assert 'Evci et al., 2020' not in page and 'Published' not in page
    programs.assert_reported_again(finished)

  def test_an_export_says_where_the_network_lies(self, finished, capsys):
    status = cli.main(['export', str(finished)])
    assert 'exported already, as best.npz' in programs.error(status, capsys)

  def test_evaluation_alone_says_the_same(self, finished, capsys):
    before = programs.times(finished)
    path = finished / 'best.npz'
    best = export.read(path)
    for given, step, loss in (
      (finished, 8, result(finished)['loss']),
      (path, best.about['step'], best.about['scores']['loss']),
    ):
      assert run('--evaluate', given, *ONE_DEVICE) == 0
      printed = capsys.readouterr().out
      assert _column(printed, 'loss') == pytest.approx(loss, rel=2e-3)
      assert _column(printed, 'step') == step
    assert programs.times(finished) == before
    # It is the mean under its masks.
    theta, held = best[:2]
    chex.assert_trees_all_equal(theta, masks.apply_masks(theta, held))
    density = setup.density(setup.Weights(theta, held, {}))
    assert density == pytest.approx(result(finished)['density'])


def test_bench_knows_the_networks_of_the_presets():
  config = dataclasses.replace(
    PRESETS['dense'],
    net=NetConfig(depth=18),
    data=ImagesConfig(synthetic=True, image_size=32),
  )
  run = image_run.assemble(config)
  model = pruned_model.model_of(image_run.model(run))
  assert model == ('resnet_18', 1000, (32, 32, 3), False)
  images = np.zeros((1, *model.image_shape), np.float32)
  chex.assert_trees_all_equal_shapes(
    step_lib.shapes(nets.make(model.net, model.num_classes), images),
    setup.shapes(run.net, 32),
  )
  small = dataclasses.replace(config, net=PRESETS['tiny'].net)
  assert image_run.model(run._replace(config=small)) == {}


def _expected_density():
  """That of 0.2 of each layer, with all of the first."""
  config = PRESETS['tiny']
  theta = setup.shapes(setup.make_net(config.net, 10), 32)
  sparsities = methods.uniform_dense_stem(theta, 0.8)
  sizes = {name: theta[name[:-2]]['w'].size for name in sparsities}
  kept = [masks.num_kept(sizes[name], s) for name, s in sparsities.items()]
  return sum(kept) / sum(sizes.values())


def _column(table, name):
  """The number in the last table printed, below a heading."""
  lines = [line for line in table.splitlines() if line.strip()]
  heads = re.split(r'\s{2,}', lines[-2].strip())
  values = re.split(r'\s{2,}', lines[-1].strip())
  return float(values[heads.index(name)].replace(',', ''))


@pytest.mark.slow
def test_photographs_are_trained_on_resumed_and_evaluated(tfds_dir, tmp_path):
  out = tmp_path / 'run'
  args = [*TINY, '--data.dir', tfds_dir, '--data.test', 'validation[:32]']
  assert run(*args, '--out', out) == 0
  whole = result(out)
  # As if it had been killed after step 6.
  for name in ('results.json', 'complete.json', 'report.html'):
    (out / name).unlink()
  (out / 'checkpoints' / '8').rename(tmp_path / '8')
  assert run(*args, '--out', out, '--resume') == 0
  assert result(out) == whole
  assert run('--evaluate', out, '--data.dir', tfds_dir, *ONE_DEVICE) == 0


@pytest.mark.slow
def test_folder_of_another_run_is_refused(finished, capsys):
  before = programs.times(finished)
  for args, message in (
    (SYNTHETIC, 'already holds a run of imagenet_resnet50; pass --resume'),
    ([*SYNTHETIC, '--resume', '--alpha', '2'], 'alpha: 1.5 → 2.0'),
  ):
    status = run(*args, '--out', finished)
    assert message in programs.error(status, capsys)
  assert programs.times(finished) == before


@pytest.mark.slow
def test_hosts_that_disagree_are_refused(tmp_path):
  port, out = processes.free_port(), tmp_path / 'run'
  first, second = (
    processes.started(
      *('-m', 'experiments.imagenet_resnet50', '--preset', 'tiny'),
      *('--data.synthetic', '--key', index, '--out', out),
      *(f'--hosts.coordinator=127.0.0.1:{port}', '--hosts.count=2'),
      f'--hosts.index={index}',
    )
    for index in (0, 1)
  )
  with first as one, second as other:
    for host in (one, other):
      _, printed = host.communicate(timeout=300)
      [line] = [x for x in printed.splitlines() if x.startswith('error: ')]
      assert host.returncode == 2
      assert 'host 1 differs from host 0: settings.key: 0 → 1' in line
  assert not out.exists()


def test_all_hosts_get_the_folder_of_a_single_one(tmp_path):
  out = str(tmp_path / 'run')
  settings = identity(PRESETS['tiny'])
  for resume in (False, True):
    folder = image_run.open_folder(out, settings, resume=resume)
    assert folder.is_resumed == resume
