"""Where arrays of images come from: bundled digits, TFDS on disk, a .npz file.

Each reader returns a Source; data.load turns it into the splits of a run.
"""

import functools
import os
import pathlib
from typing import Any, NamedTuple
import zipfile
import zlib

import numpy as np

from powerprop_jax.core import names
from powerprop_jax.files import json_files
from powerprop_jax.train import progress as progress_lib
from powerprop_jax.train.runs.errors import UserError

# Sets that `powerprop data get` downloads; any image classification set of TFDS
# works.
DOWNLOADABLE = (
  'mnist',
  'fashion_mnist',
  'kmnist',
  'cifar10',
  'cifar100',
  'svhn_cropped',
)
KNOWN_NAMES = ('digits', *DOWNLOADABLE)
# Read in batches by image_set, as they do not fit into memory.
LARGE_NAMES = ('imagenet2012',)
_DIR = '~/tensorflow_datasets'
_DIR_VARIABLE = 'POWERPROP_TFDS_DIR'
INSTALL = "install it with: pip install 'powerprop_jax[train]'"


class Arrays(NamedTuple):
  """Labelled images.

  Attributes:
    images: uint8 [N, H, W, C] in 0..255, or float32 of the same shape.
    labels: int32 [N], from 0.
  """

  images: np.ndarray
  labels: np.ndarray


class Source(NamedTuple):
  """What a reader found; validation where the source sets some apart."""

  train: Arrays
  validation: Arrays | None
  test: Arrays
  num_classes: int


def digits() -> Source:
  """The 1,797 digits of scikit-learn, float32 in [0, 1], 8×8×1.

  The split is ours and never changes: 1,437 examples to train on, 360 to test
  on. The examples are in an order in which every stretch has the classes in
  nearly their overall proportions, so that what is cut off the end of the
  training examples for validation is stratified too.

  Source:
    Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI, 1998.
  """
  try:
    from sklearn import datasets
  except ImportError as error:
    raise UserError(f'digits come with scikit-learn; {INSTALL}') from error
  bunch = datasets.load_digits()
  labels = bunch.target.astype(np.int32)
  shuffled = np.random.RandomState(0).permutation(len(labels))
  # Position of each example within its class, as a share of the class.
  share = np.empty(len(labels))
  for label in range(10):
    members = shuffled[labels[shuffled] == label]
    share[members] = (np.arange(len(members)) + 0.5) / len(members)
  order = np.argsort(share, kind='stable')
  images = (bunch.images / 16).astype(np.float32)[order, :, :, None]
  labels = labels[order]
  return Source(
    Arrays(images[:-360], labels[:-360]),
    None,
    Arrays(images[-360:], labels[-360:]),
    num_classes=10,
  )


def npz(path: str) -> Source:
  """Arrays from a .npz file with the keys of Keras.

  It holds x_train, y_train, x_test and y_test, and may hold x_validation
  and y_validation. Images are uint8 or floating, [N, H, W, C] or [N, H, W] (one
  channel) or [N, F] (features: an image of one pixel with F channels). Labels
  are integers from 0, [N] or [N, 1]. Floating images are taken as they are.
  There is one more class than the largest label to train on.
  """
  arrays = _read_npz(path)
  parts = ['train', 'test']
  if 'x_validation' in arrays or 'y_validation' in arrays:
    parts.append('validation')
  needed = [f'{x}_{part}' for part in parts for x in 'xy']
  missing = [key for key in needed if key not in arrays]
  if missing:
    raise UserError(
      f'{path} lacks {", ".join(missing)}: it has '
      f'{", ".join(arrays) or "none"}.'
    )
  splits = {
    name: Arrays(
      _check_images(arrays[f'x_{name}'], f'x_{name} of {path}'),
      _check_labels(arrays[f'y_{name}'], f'y_{name} of {path}'),
    )
    for name in parts
  }
  num_classes = int(splits['train'].labels.max()) + 1
  kind = lambda images: (images.shape[1:], images.dtype)
  reference = kind(splits['train'].images)
  for name, (images, labels) in splits.items():
    if len(images) != len(labels):
      raise UserError(
        f'x_{name} of {path} has {len(images)} images but y_{name} has '
        f'{len(labels)} labels; they must be as many.'
      )
    if kind(images) != reference:
      raise UserError(
        f'x_{name} of {path} has images of shape {images.shape[1:]} and type '
        f'{images.dtype}, x_train {reference[0]} and {reference[1]}; they must '
        'agree.'
      )
    if labels.max() >= num_classes:
      raise UserError(
        f'y_{name} of {path} has the label {labels.max()}, but the labels of '
        f'y_train end at {num_classes - 1}.'
      )
  return Source(
    splits['train'], splits.get('validation'), splits['test'], num_classes
  )


def _read_npz(path: str) -> dict[str, np.ndarray]:
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise UserError(f'there is no file {file}. Give the path of a .npz file.')
  try:
    with open(file, 'rb') as stream:
      # A file of numpy.save would come back as an array.
      if not zipfile.is_zipfile(stream):
        raise ValueError('it is not a .npz archive')
      archive = np.load(stream, allow_pickle=False)
      return {key: archive[key] for key in archive.files}
  except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
    raise UserError(
      f'cannot read {file}: {e}. Write it with numpy.savez(path, '
      'x_train=…, y_train=…, x_test=…, y_test=…), from arrays of numbers.'
    ) from e


def _check_images(images: np.ndarray, what: str) -> np.ndarray:
  if images.ndim not in (2, 3, 4):
    raise UserError(
      f'{what} has shape {images.shape}; expected are [N, H, W, C], [N, H, W] '
      'or [N, F].'
    )
  if images.size == 0:
    raise UserError(f'{what} is empty (shape {images.shape}).')
  if images.dtype != np.uint8:
    if images.dtype.kind != 'f':
      raise UserError(
        f'{what} has type {images.dtype}; images are uint8 (0 to 255) or '
        'floating.'
      )
    with np.errstate(over='ignore'):  # infinite, which is refused below
      images = images.astype(np.float32)
    if not np.isfinite(images).all():
      raise UserError(
        f'{what} has NaN or infinite entries, in float32; remove them.'
      )
  if images.ndim == 2:
    return images[:, None, None, :]
  return images[..., None] if images.ndim == 3 else images


def _check_labels(labels: np.ndarray, what: str) -> np.ndarray:
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.ndim != 1:
    raise UserError(
      f'{what} has shape {labels.shape}; expected is [N]. Of one-hot labels, '
      'take labels.argmax(axis=1).'
    )
  if labels.dtype.kind not in 'iu':
    raise UserError(
      f'{what} has type {labels.dtype}; labels are integers. Convert whole '
      'numbers with labels.astype(int).'
    )
  if labels.size == 0:
    raise UserError(f'{what} is empty.')
  if labels.min() < 0 or labels.max() > 1_000_000:
    raise UserError(
      f'{what} has labels from {labels.min()} to {labels.max()}; they count '
      'the classes from 0.'
    )
  return labels.astype(np.int32)


def folder_of(chosen: str | None) -> pathlib.Path:
  """Where data sets lie: a chosen folder, or the one of this machine.

  That is $POWERPROP_TFDS_DIR or, without it, ~/tensorflow_datasets.
  """
  default = os.environ.get(_DIR_VARIABLE) or _DIR
  return pathlib.Path(chosen or default).expanduser()


def named(name: str, folder: str | None, show_progress: bool = False) -> Source:
  """A data set by name, as `powerprop data get` or TFDS leaves it in a folder.

  The examples are the same, in the same order, in either form.
  """
  path = folder_of(folder) / f'{name}.npz'
  if name in DOWNLOADABLE and path.is_file():
    return npz(str(path))
  return tfds(name, folder, show_progress)


def tfds(name: str, folder: str | None, show_progress: bool = False) -> Source:
  """An image data set of TensorFlow Datasets that lies prepared on disk.

  Reads ArrayRecord files without TensorFlow and without a network; images are
  uint8. Without a test split, the validation split is the test set.

  The name is e.g. 'mnist', or 'name/config', of which the newest version is
  read; for the folder see folder_of. What is not there, not in
  ArrayRecord form, damaged, or not labelled images of one size is refused.
  """
  if name.split('/')[0] in LARGE_NAMES:
    raise UserError(
      f'{name} does not fit into memory; train/images reads it in batches.'
    )
  path = find_prepared(name, folder)
  builder = open_builder(name, str(path))
  splits = {key: info.num_examples for key, info in builder.info.splits.items()}
  features = builder.info.features
  if None in features['image'].shape:
    raise UserError(
      f'{name} has images of shape {features["image"].shape}; only sets of '
      'images of one size can be held in memory.'
    )
  if 'train' not in splits or not {'test', 'validation'} & set(splits):
    raise UserError(
      f'{name} has the splits {", ".join(splits)}; needed are train, and test '
      'or validation.'
    )

  def read(split: str) -> Arrays:
    images = np.empty((splits[split], *features['image'].shape), np.uint8)
    labels = np.empty(splits[split], np.int32)
    try:
      source = builder.as_data_source(split=split)
      description = f'reading {name} {split}' if show_progress else ''
      with progress_lib.Progress(
        description, len(labels), unit='images'
      ) as progress:
        for start in range(0, len(labels), 1000):
          stop = min(start + 1000, len(labels))
          block = source.__getitems__(list(range(start, stop)))
          images[start:stop] = [example['image'] for example in block]
          labels[start:stop] = [example['label'] for example in block]
          progress.update(stop)
    except Exception as error:
      raise damaged(name, split, path, error) from error
    return Arrays(images, labels)

  is_split = 'test' in splits and 'validation' in splits
  return Source(
    read('train'),
    read('validation') if is_split else None,
    read('test' if 'test' in splits else 'validation'),
    features['label'].num_classes,
  )


def find_prepared(name: str, folder: str | None) -> pathlib.Path:
  """The newest version of a data set on disk, in ArrayRecord form.

  It is looked for before TFDS is asked, which would look on the network, for
  minutes. For the folder see folder_of.
  """
  root = folder_of(folder)
  versions = {
    info.parent: tuple(map(int, info.parent.name.split('.')))
    for info in (root / name).glob('*/dataset_info.json')
    if info.parent.name.replace('.', '').isdigit()
  }
  if not versions:
    raise UserError(_not_prepared(name, root))
  path = max(versions, key=lambda version: versions[version])
  info = json_files.read_json(path / 'dataset_info.json')
  file_format = info.get('fileFormat', 'tfrecord')
  if file_format != 'array_record':
    advice = f'in another folder, {how_to_get(name, "DIR")}'
    if name in DOWNLOADABLE:
      advice = how_to_get(name, root)
    raise UserError(
      f'{path} holds {file_format} files, which only TensorFlow reads; {advice}'
    )
  return path


def prepared(folder: pathlib.Path) -> list[str]:
  """Names of the data sets in a folder that TFDS has prepared."""
  return sorted(
    {
      info.parent.parent.relative_to(folder).as_posix()
      for depth in ('*/*', '*/*/*')
      for info in folder.glob(f'{depth}/dataset_info.json')
    }
  )


def _not_prepared(name: str, folder: pathlib.Path) -> str:
  found = prepared(folder)
  there = f'it has {", ".join(found)}' if found else 'it has no data set'
  if not folder.is_dir():
    there = 'that folder does not exist'
  known = (*KNOWN_NAMES, *LARGE_NAMES)
  if name in known:
    return (
      f'{name} is not prepared in {folder} ({there}). Give the folder of your '
      f'data sets with --data.dir, or {how_to_get(name, folder)}'
    )
  close = names.closest(name, {*known, *found})
  return (
    f'unknown data set {name!r}'
    + (f', did you mean {close[0]!r}?' if close else '.')
    + f' Known are {", ".join(KNOWN_NAMES)}, a path ending in .npz, and any '
    f'image data set of TFDS that is prepared in {folder} ({there}).'
  )


def how_to_get(name: str, folder: str | pathlib.Path) -> str:
  """The end of a message: what to do so that a data set is found by name."""
  if name in DOWNLOADABLE:
    return f'download it: powerprop data get {name} --dir {folder}'
  first = ''
  if name == 'imagenet2012':
    tars = 'ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar'
    first = f'put {tars} of image-net.org into {folder}/downloads/manual and '
  return (
    f'{first}prepare it once: pip install tensorflow tensorflow-datasets '
    'importlib_resources && python -c "import tensorflow_datasets as t; '
    f"t.builder('{name}', data_dir='{folder}', file_format='array_record')"
    '.download_and_prepare()"'
  )


@functools.lru_cache(maxsize=8)
def open_builder(name: str, path: str) -> Any:
  """TFDS's reader of what find_prepared found, if it is labelled images."""
  try:
    import tensorflow_datasets
  except ImportError as error:
    raise UserError(
      f'{name} is read with tensorflow-datasets; {INSTALL}'
    ) from error
  builder = tensorflow_datasets.builder_from_directory(path)
  features = builder.info.features
  keys = list(getattr(features, 'keys', list)())
  if not {'image', 'label'} <= set(keys):
    raise UserError(
      f'{name} is not an image classification set: its features are '
      f"{', '.join(keys)}; needed are 'image' and 'label'."
    )
  shape, kind = features['image'].shape, features['image'].np_dtype
  if len(shape) != 3 or kind != np.uint8:
    raise UserError(
      f'{name} has images of shape {shape} and type {np.dtype(kind)}; needed '
      'are single images of 8 bits.'
    )
  if not hasattr(features['label'], 'num_classes'):
    raise UserError(
      f'the labels of {name} are no classes but {features["label"]}; needed is '
      'one class for each image.'
    )
  return builder


def damaged(
  name: str, split: str, path: pathlib.Path, error: Exception
) -> UserError:
  """What to say of files in the folder of a version that cannot be read."""
  return UserError(
    f'cannot read the split {split} in {path}: {error}. Delete that folder and '
    f'{how_to_get(name, path.parent.parent)}'
  )
