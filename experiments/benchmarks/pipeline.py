r"""How fast the input pipeline is, against the decoder alone.

    python -m experiments.benchmarks.pipeline --dir DIR
    python -m experiments.benchmarks.pipeline --dir DIR --enlarge 1.72

measures three things on the same image files, in rounds of another order each:

whole     one process decodes whole files that are in its memory.
crop      one process decodes what it needs of each file for a random crop,
          resizes and perhaps mirrors it.
pipeline  workers read files from disk in a random order, do the same as `crop`,
          and hand over batches. They wait while other programs are measured.

`per s` is images by the clock, for each worker; `per CPU s` is images for each
second that a processor core spent in the process, or in the workers, which
other work on the machine disturbs less. `/ whole` and `/ crop` compare `per CPU
s` with that of whole files and of the fastest decoder of crops in the same
round; their medians are printed. `main` is the time that the process which is
handed the batches spends on each image, in microseconds.

With --enlarge the files are first decoded, enlarged and encoded again, in a
temporary folder: 1.72 gives images that were scaled to 0.58 their sizes back.
Takes two minutes on two CPU cores.
"""

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import random
import statistics
import tempfile
import time
from typing import NamedTuple

import psutil  # comes with grain

import experiments
from powerprop_jax.files import json_files, tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train.cli import timing
from powerprop_jax.train.images import batches as image_batches
from powerprop_jax.train.images import crops, decode, image_set
from powerprop_jax.train.images.decode import Decoder
from powerprop_jax.train.images.image_set import ImageSet
from powerprop_jax.train.images.stream import Stream
from powerprop_jax.train.runs import errors
from powerprop_jax.train.runs.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
  """Speed of the input pipeline, against the decoder alone."""

  # A data set of images in ArrayRecord form.
  name: str = 'imagenet2012'
  # Folder of prepared TFDS data sets; None is ~/tensorflow_datasets.
  dir: str | None = None
  # Its split.
  split: str = 'train'
  # Side of the images that are trained on.
  image_size: int = 224
  # Images in a batch of the pipeline.
  batch_size: int = 64
  # Files that a run decodes, the first ones.
  files: int = 512
  # Batches that a run of the pipeline hands over.
  batches: int = 24
  # Numbers of worker processes.
  workers: tuple[int, ...] = (1, 2)
  # Factor by which the sides of the files' images are enlarged first.
  enlarge: float = 1.0
  # Quality of the JPEG files if they are.
  quality: int = 98
  # Runs of each program.
  repeats: int = 15
  # File for the results, as JSON; must not exist.
  out: pathlib.Path | None = None


class Speed(NamedTuple):
  """Of one run."""

  # Images a second by the clock.
  wall: float
  # Images a second of a processor core, in the workers if there are any.
  cpu: float
  # Seconds that a core spent on an image in this process beside them.
  main: float = 0.0


def main(config: Config) -> None:
  """Measures, prints and perhaps saves."""
  _check(config)
  images = image_set.open_set(config.name, config.dir, config.split)
  with contextlib.ExitStack() as stack:
    if config.enlarge != 1:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      images = enlarged(images, folder, config)
    files = [example.data for example in _first(config, images)]
    programs = _programs(config, images, files, stack)
    print(timing.environment())
    print(_describe(config, images, files), flush=True)
    for program in programs.values():
      program()  # starts workers and fills caches
    speeds: dict[str, list[Speed]] = {name: [] for name in programs}
    shuffled = random.Random(0)
    for _ in range(config.repeats):
      for name in shuffled.sample(list(programs), len(programs)):
        speeds[name].append(programs[name]())
  records = _records(speeds)
  print(tables.text_table([_row(record) for record in records]))
  for record in records:
    if record['program'].startswith('pipeline'):
      print(
        f'{record["program"]}: {record["to_whole"]:.2f} of the speed of the '
        f'decoder alone, {record["to_crop"]:.2f} of decoding and cropping.'
      )
  if config.out is not None:
    environment = {'environment': timing.environment()}
    json_files.write_json(
      config.out, [environment | record for record in records]
    )


def _check(config: Config) -> None:
  if config.out is not None and config.out.exists():
    raise UserError(f'{config.out} exists already; choose another --out.')
  errors.check_positive(
    config, 'image_size', 'batch_size', 'files', 'batches', 'repeats'
  )
  if config.enlarge <= 0:
    raise UserError(f'--enlarge must be positive, got {config.enlarge}.')
  if config.workers and min(config.workers) < 0:
    raise UserError(f'--workers must be at least 0, got {min(config.workers)}.')


def _describe(config: Config, images: ImageSet, files: Sequence[bytes]) -> str:
  sizes = [decode.decode(file).shape for file in files]
  pixels = statistics.fmean(size[0] * size[1] for size in sizes)
  load = ', '.join(f'{x:.1f}' for x in os.getloadavg())
  return (
    f'{images.name} {images.split}, {len(files)} files, on average '
    f'{statistics.fmean(map(len, files)) / 1e3:.0f} kB and '
    f'{pixels / 1e6:.3f} megapixels; crops of {config.image_size}²; medians of '
    f'{config.repeats} interleaved runs. Processes waiting for a core, in the '
    f'last 1, 5 and 15 minutes: {load}.\n'
  )


def _first(config: Config, images: ImageSet) -> list[image_set.Example]:
  count = min(config.files, images.num_examples)
  return image_set.read(images, range(count))


def enlarged(images: ImageSet, folder: str, config: Config) -> ImageSet:
  """A copy of the first files of a set, in a folder, their images enlarged."""
  from PIL import Image

  examples = []
  for example in _first(config, images):
    image = Image.fromarray(decode.decode(example.data))
    sides = [max(1, round(side * config.enlarge)) for side in image.size]
    file = io.BytesIO()
    image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC).save(
      file, 'JPEG', quality=config.quality
    )
    examples.append(example._replace(data=file.getvalue()))
  image_set.write(folder, 'enlarged', {'train': examples}, images.num_classes)
  return image_set.open_set('enlarged', folder, 'train')


def _programs(
  config: Config,
  images: ImageSet,
  files: Sequence[bytes],
  stack: contextlib.ExitStack,
) -> dict[str, Callable[[], Speed]]:
  """The programs by name; the stack closes their streams."""
  programs: dict[str, Callable[[], Speed]] = {}
  import cv2

  cv2.setNumThreads(0)  # as in a worker
  size = config.image_size
  # nvImageCodec decodes parts alone for us.
  programs['whole, opencv'] = functools.partial(_decode_whole, files)
  for decoder in decode.installed():
    crop = functools.partial(_decode_crops, files, size, decoder)
    programs[f'crop, {decoder}'] = crop
  for count in config.workers:
    noun = 'worker' if count == 1 else 'workers'
    share = image_batches.Share(config.batch_size, size)
    batches = image_batches.training_batches(images, share)
    stream = stack.enter_context(Stream(batches, num_workers=count))
    others = psutil.Process().children()
    next(stream)  # starts the workers
    workers = [p for p in psutil.Process().children() if p not in others]
    programs[f'pipeline, {count} {noun}'] = functools.partial(
      _run_pipeline, config, stream, workers, count
    )
  return programs


def _decode_whole(files: Sequence[bytes]) -> Speed:
  wall, cpu = time.perf_counter(), time.process_time()
  for file in files:
    decode.decode(file)
  return _speed(len(files), wall, cpu)


def _decode_crops(
  files: Sequence[bytes], image_size: int, decoder: Decoder
) -> Speed:
  wall, cpu = time.perf_counter(), time.process_time()
  draws = crops.random_draws(0, 0, len(files))
  for drawn, file in zip(draws, files, strict=True):
    choose = functools.partial(crops.random_crop, drawn)
    decode.decode_crop(file, choose, image_size, decoder)
  return _speed(len(files), wall, cpu)


def _run_pipeline(
  config: Config, stream: Stream, workers: list[psutil.Process], count: int
) -> Speed:
  # Until nothing is left of what the workers made meanwhile.
  for _ in range(3 * count + 1):
    next(stream)
  wall, cpu = time.perf_counter(), time.process_time()
  workers_cpu = _cpu_of(workers)
  for _ in range(config.batches):
    next(stream)
  num_images = config.batches * config.batch_size
  alone = _speed(num_images, wall, cpu)
  if not count:
    return alone
  workers_cpu = _cpu_of(workers) - workers_cpu
  _wait_for_rest(workers)
  return Speed(
    alone.wall / count, num_images / max(1e-6, workers_cpu), 1 / alone.cpu
  )


def _cpu_of(workers: list[psutil.Process]) -> float:
  """Seconds that cores have spent in processes."""
  times = [worker.cpu_times() for worker in workers]
  return sum(t.user + t.system for t in times)


def _wait_for_rest(workers: list[psutil.Process]) -> None:
  """Until workers have made all the batches that they may make ahead."""
  is_busy = True
  while is_busy:
    before = _cpu_of(workers)
    time.sleep(0.1)
    is_busy = _cpu_of(workers) - before > 0.02


def _speed(count: int, wall: float, cpu: float) -> Speed:
  """From the readings of two clocks at the start."""
  cpu_end, wall_end = time.process_time(), time.perf_counter()
  # The clock of a processor may stand still for a while.
  return Speed(count / (wall_end - wall), count / max(1e-6, cpu_end - cpu))


def _records(speeds: dict[str, list[Speed]]) -> list[Row]:
  whole = speeds['whole, opencv']
  crop = speeds[f'crop, {decode.fastest()}']
  return [
    {
      'program': name,
      'per_second': statistics.median(run.wall for run in runs),
      'per_cpu_second': statistics.median(run.cpu for run in runs),
      'main_seconds': statistics.median(run.main for run in runs),
      'to_whole': _median_ratio(runs, whole),
      'to_crop': _median_ratio(runs, crop),
      'runs': [run._asdict() for run in runs],
    }
    for name, runs in speeds.items()
  ]


def _median_ratio(runs: Sequence[Speed], base: Sequence[Speed]) -> float:
  return timing.median_ratio([r.cpu for r in runs], [r.cpu for r in base])


def _row(record: Row) -> Row:
  return {
    'program': record['program'],
    'per s': round(record['per_second']),
    'per CPU s': round(record['per_cpu_second']),
    '/ whole': round(record['to_whole'], 2),
    '/ crop': round(record['to_crop'], 2),
    'main': round(1e6 * record['main_seconds']),
  }


if __name__ == '__main__':
  experiments.start(main, {'default': Config()})
