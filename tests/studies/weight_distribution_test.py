import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from absl.testing import parameterized
import programs

from experiments.weight_distribution import __main__ as weight_distribution

_ROOT = pathlib.Path(__file__).parents[2]
_TINY = [
  *('--alphas', '1', '4'),
  *('--keys', '0'),
  *('--loop.batch-size', '8'),
  *('--loop.eval-every', '2'),
  *('--loop.steps-per-dispatch', '2'),
  *('--epsilons', '0.001', '0.01'),
  *('--kept', '1', '0.1'),
]
_NETS = ('mlp', 'mnist_cnn')
# A checkpoint becomes visible under its step once it is complete.
_FIRST_CHECKPOINT = pathlib.Path('mlp', 'checkpoints', '2')


def _args(out, *more, nets=_NETS, num_steps=4):
  lengths = ['--loop.num-steps', str(num_steps)]
  return ['--nets', *nets, *_TINY, *lengths, '--out', str(out), *more]


def _run(args):
  return programs.run(weight_distribution, *args)


def _kill_after_first_checkpoint(args, out):
  """Runs the program in a process of its own and kills it while it trains."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'experiments.weight_distribution', *args],
    cwd=_ROOT,
    env=dict(os.environ),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 120
  while not (out / _FIRST_CHECKPOINT).exists():
    assert process.poll() is None, 'ended without a checkpoint'
    assert time.monotonic() < deadline, 'no checkpoint within two minutes'
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()


class WeightDistributionTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  def test_a_run_writes_everything_it_promises(self):
    out = self.folder / 'run'
    self.assertEqual(_run(_args(out)), 0)
    kinds = (
      'weight_histograms',
      'latent_histograms',
      'near_zero',
      'accuracy',
      'learning_curves',
    )
    names = [f'{kind}_{net}.png' for kind in kinds for net in _NETS]
    names += ['config.json', 'results.json', 'report.html', 'complete.json']
    names += [f'{net}/metrics.jsonl' for net in _NETS]
    for name in names:
      self.assertGreater((out / name).stat().st_size, 0, name)
    results = programs.results(out)
    for net, leaves in (('mlp', 2), ('mnist_cnn', 4)):
      of_net = [record for record in results if record['net'] == net]
      count = lambda field, of_net=of_net: sum(field in r for r in of_net)
      # For 2 powers: 2 shares kept; 2 distances in each leaf and in total; each
      # leaf of θ and of φ.
      self.assertEqual(count('accuracy'), 2 * 2)
      self.assertEqual(count('near_zero'), 2 * 2 * (leaves + 1))
      self.assertEqual(count('at_zero'), 2 * 2 * leaves)
    fields = {'net', 'alpha', 'key'}
    self.assertTrue(all(fields <= set(record) for record in results))

  def test_latent_weights_form_two_heaps_for_a_large_power_from_the_start(self):
    # φ = θ^(1/4) moves a normal distribution away from zero.
    out = self.folder / 'run'
    self.assertEqual(_run(_args(out, nets=('mlp',), num_steps=1)), 0)
    heap = {
      (record['alpha'], record['weights']): record
      for record in programs.results(out)
      if record.get('leaf') == 'mlp/linear_0/w' and 'at_zero' in record
    }
    self.assertLess(heap[4, 'phi']['at_zero'], 0.1)
    self.assertGreater(heap[4, 'phi']['peak'], 0.2)
    self.assertGreater(heap[4, 'theta']['at_zero'], 0.5)
    self.assertEqual(heap[1, 'phi']['at_zero'], heap[1, 'theta']['at_zero'])

  def test_a_killed_run_continues_to_the_same_results(self):
    nets = ('mlp', 'lenet_300_100')
    whole, killed = self.folder / 'whole', self.folder / 'killed'
    self.assertEqual(_run(_args(whole, nets=nets, num_steps=8)), 0)
    _kill_after_first_checkpoint(_args(killed, nets=nets, num_steps=8), killed)
    self.assertFalse((killed / 'results.json').exists())
    self.assertEqual(_run(_args(killed, '--resume', nets=nets, num_steps=8)), 0)
    self.assertEqual(programs.results(killed), programs.results(whole))
    for net in nets:
      name = f'{net}/metrics.jsonl'
      self.assertEqual(
        (killed / name).read_text(), (whole / name).read_text(), name
      )

  def test_a_network_that_is_finished_is_not_trained_again(self):
    out = self.folder / 'run'
    self.assertEqual(_run(_args(out, nets=('mlp',))), 0)
    checkpoints = out / 'mlp' / 'checkpoints'
    before = {p: p.stat().st_mtime_ns for p in checkpoints.rglob('*')}
    results = programs.results(out)
    self.assertEqual(_run(_args(out, '--resume', nets=('mlp',))), 0)
    after = {p: p.stat().st_mtime_ns for p in checkpoints.rglob('*')}
    self.assertEqual(after, before)
    self.assertEqual(programs.results(out), results)

  @parameterized.parameters(
    (['--nets', 'mlpp'], 'mlpp'),
    (['--nets', 'mlp', 'mlp'], '--nets'),
    (['--alphas', '0.5'], '0.5'),
    (['--kept', '0'], '--kept'),
    (['--epsilons', '0'], '--epsilons'),
    (['--data.name', 'mnits'], 'mnits'),
  )
  def test_bad_input_is_one_line_and_nothing_is_written(self, args, named):
    out = self.folder / 'run'
    process = subprocess.run(
      [sys.executable, '-m', 'experiments.weight_distribution', *args]
      + ['--out', str(out)],
      cwd=_ROOT,
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(process.returncode, 2, process.stderr)
    self.assertEqual(process.stderr.count('\n'), 1, process.stderr)
    self.assertIn(named, process.stderr)
    self.assertFalse(out.exists())
