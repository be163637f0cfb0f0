"""Labelled image files in the ArrayRecord form of TensorFlow Datasets.

Files stay encoded, and only those that are asked for are read. An ImageSet is
a plain description that can be sent to another process, which opens the files
for itself.
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import functools
import pathlib
import time
from typing import Any, NamedTuple

from powerprop_jax.files import json_files
from powerprop_jax.train.data import sources
from powerprop_jax.train.runs.errors import UserError

# That wait for disks at the same time.
_NUM_THREADS = 8
# Seconds that reading an example may take, from memory 20 to 60 µs, and seconds
# that all of them may take beyond that: another process may have had the core.
_PATIENCE = 2e-4
_SLACK = 2e-3


class ImageSet(NamedTuple):
  """A split of a data set on disk; path is the folder of the version read."""

  name: str
  split: str
  path: str
  num_examples: int
  num_classes: int


class Example(NamedTuple):
  """The bytes of an image file, its class, and its name for messages."""

  data: bytes
  label: int
  name: str


def open_set(name: str, folder: str | None, split: str) -> ImageSet:
  """Finds an image classification set that lies prepared on disk.

  For its name and folder see sources.find_prepared; a split is written as in
  TFDS, e.g. 'train', 'validation', 'train[:1000]'.
  """
  path = sources.find_prepared(name, folder)
  builder = sources.open_builder(name, str(path))
  base = split.partition('[')[0]
  if base not in builder.info.splits:
    raise UserError(
      f'{name} has no split {split!r}; there are: '
      f'{", ".join(builder.info.splits)}.'
    )
  try:
    num_examples = builder.info.splits[split].num_examples
  except Exception as error:
    raise UserError(
      f'cannot take {split!r} of {name}: {error} Write it as in '
      f"'{base}[:1000]' or '{base}[10%:]'."
    ) from error
  if not num_examples:
    raise UserError(f'{split} of {name} in {path} has no examples.')
  num_classes = builder.info.features['label'].num_classes
  return ImageSet(name, split, str(path), num_examples, num_classes)


def read(images: ImageSet, indices: Sequence[int]) -> list[Example]:
  """Examples as they lie on disk, one for each index, in any order."""
  # Here, as threads that import TFDS at the same time may wait for each other.
  source = _source(images.name, images.path, images.split)
  message = _message()
  read_one = functools.partial(_read_one, images, source, message)
  found: list[Example] = []
  # Threads that read from memory wait for each other, and cost three times the
  # work: they take over only where a disk is slow. TFDS's own way to read many
  # starts up to 64 threads each time.
  start = time.perf_counter()
  for index in indices:
    if time.perf_counter() - start > _SLACK + _PATIENCE * len(found):
      return found + list(_threads().map(read_one, indices[len(found) :]))
    found.append(read_one(index))
  return found


def _read_one(
  images: ImageSet, source: Any, message: Any, index: int
) -> Example:
  try:
    record = source[index]
    # It does not raise where a file ends too early.
    if not record:
      raise OSError(f'there is nothing where example {index} should be')
    features = message.FromString(record).features.feature
    name = f'{images.split} {index}'
    for key in ('file_name', 'id'):
      if key in features and features[key].bytes_list.value:
        name = features[key].bytes_list.value[0].decode(errors='replace')
    data = features['image'].bytes_list.value
    labels = features['label'].int64_list.value
    example = Example(
      data[0] if data else b'', labels[0] if labels else -1, name
    )
  except Exception as error:
    path = pathlib.Path(images.path)
    raise sources.damaged(images.name, images.split, path, error) from error
  if not 0 <= example.label < images.num_classes:
    raise UserError(
      f'{name} of {images.name} {images.split} has the label {example.label}, '
      f'but its classes are 0 to {images.num_classes - 1}. Prepare the data '
      'set again, or use a labelled split.'
    )
  return example


def write(
  folder: str | pathlib.Path,
  name: str,
  splits: Mapping[str, Sequence[Example]],
  num_classes: int,
) -> None:
  """Writes image files as TFDS would, without TensorFlow.

  The data set must not be in the folder. Neither images nor labels are checked.
  """
  from array_record.python import array_record_module
  import tensorflow_datasets as tfds

  path = pathlib.Path(folder) / name / '1.0.0'
  path.mkdir(parents=True)
  features = tfds.features.FeaturesDict(
    {
      'file_name': tfds.features.Text(),
      'image': tfds.features.Image(),
      'label': tfds.features.ClassLabel(num_classes=num_classes),
    }
  )
  features.save_config(str(path))
  infos = []
  for split, examples in splits.items():
    file = path / f'{name}-{split}.array_record-00000-of-00001'
    writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
    for example in examples:
      record = _message()()
      feature = record.features.feature
      feature['image'].bytes_list.value.append(example.data)
      feature['label'].int64_list.value.append(example.label)
      feature['file_name'].bytes_list.value.append(example.name.encode())
      writer.write(record.SerializeToString())
    writer.close()
    infos.append(
      {
        'filepathTemplate': '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        'name': split,
        'numBytes': str(sum(len(example.data) for example in examples)),
        'shardLengths': [str(len(examples))],
      }
    )
  info = {'fileFormat': 'array_record', 'name': name, 'version': '1.0.0'}
  json_files.write_json(path / 'dataset_info.json', info | {'splits': infos})


@functools.cache
def _threads() -> futures.Executor:
  return futures.ThreadPoolExecutor(_NUM_THREADS)


@functools.cache
def _message() -> Any:
  from tensorflow_datasets.proto import tf_example_pb2

  return tf_example_pb2.Example


@functools.lru_cache(maxsize=8)
def _source(name: str, path: str, split: str) -> Any:
  """Records of a split, unparsed: TFDS's own parser is slow for its purpose."""
  from tensorflow_datasets import decode

  return sources.open_builder(name, path).as_data_source(
    split=split, deserialize_method=decode.DeserializeMethod.RAW_BYTES
  )
