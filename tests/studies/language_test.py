"""Sparse language models are trained and compared by their loss."""

import programs
import pytest

from experiments.language import __main__ as language

ARGS = [
  *('--loop.num-steps=4', '--loop.batch-size=2', '--loop.eval-every=4'),
  *('--loop.steps-per-dispatch=2', '--sparse.period=1', '--sparse.stop=1'),
  *('--optimizer.warmup-steps=1', '--data.context=8', '--methods', 'rigl'),
]


@pytest.mark.slow
def test_the_table_has_the_loss(tmp_path):
  text = tmp_path / 'text.txt'
  text.write_text('to be or not to be, ' * 40)
  out = tmp_path / 'run'
  more = '--data.name', text, '--execution', 'condensed', '--out', out
  assert programs.run(language, *ARGS, *more) == 0
  programs.assert_written(out, 'table.md')
  (record,) = programs.results(out)
  row = (out / 'table.md').read_text().splitlines()[-1]
  assert row.endswith(f'| {record["loss"]:.4f} |')
  assert abs(record['density_measured'] - 0.1) < 1e-4
