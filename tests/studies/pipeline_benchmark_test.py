"""The benchmark of the input pipeline runs; no time is asserted."""

import dataclasses
import json

import image_files
import pytest

from experiments.benchmarks import pipeline
from powerprop_jax.train.images import decode, image_set

SMALL = {'image_size': 8, 'batch_size': 2, 'files': 3, 'batches': 2}


@pytest.fixture
def config(tmp_path):
  image_files.make_set(tmp_path, image_files.examples(5))
  return pipeline.Config(
    name='tiny', dir=str(tmp_path), workers=(0,), repeats=1, **SMALL
  )


def test_prints_and_writes_a_row_for_each_program(config, capsys, tmp_path):
  out = tmp_path / 'results.json'
  pipeline.main(dataclasses.replace(config, out=out))
  printed = capsys.readouterr().out
  assert '3 files, on average' in printed and 'pipeline, 0 workers: ' in printed
  records = json.loads(out.read_text())
  names = [record['program'] for record in records]
  assert [name for name in names if name != 'crop, nvimgcodec'] == [
    *('whole, opencv', 'crop, opencv', 'pipeline, 0 workers'),
  ]
  of = dict(zip(names, records, strict=True))
  assert of['whole, opencv']['to_whole'] == 1
  assert of[f'crop, {decode.fastest()}']['to_crop'] == 1
  for record in records:
    assert record['environment'].startswith('Python ')
    assert f'\n{record["program"]}  ' in printed
  with pytest.raises(ValueError, match='exists already'):
    pipeline.main(dataclasses.replace(config, out=out))
  with pytest.raises(ValueError, match="did you mean 'tiny'"):
    pipeline.main(dataclasses.replace(config, name='tinny'))


@pytest.mark.slow
def test_workers_are_measured(config, capsys):
  config = dataclasses.replace(config, workers=(1,), enlarge=2.0)
  pipeline.main(config)
  printed = capsys.readouterr().out
  assert 'enlarged train, 3 files' in printed
  assert 'pipeline, 1 worker: ' in printed


def test_enlarged_images_are_larger(config, tmp_path):
  images = image_set.open_set('tiny', config.dir, 'train')
  config = dataclasses.replace(config, enlarge=2.5)
  copy = pipeline.enlarged(images, str(tmp_path / 'copy'), config)
  assert copy.num_examples == 3 and copy.num_classes == 5
  for index, example in enumerate(image_set.read(copy, range(3))):
    pixels = decode.decode(example.data)
    assert pixels.shape == (100, 125, 3) and example.label == index
    assert abs(pixels.mean() - 10 * index) < 2
