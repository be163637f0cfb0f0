"""Small data sets, downloaded from where they are published.

    get('mnist', folder)  →  folder/mnist.npz, which sources.named reads

Each file goes on where an earlier download of it was broken off, and is used
only if its size and SHA-256 are those of the published one. TensorFlow is not
needed. The examples are in the order in which TensorFlow Datasets has them, so
that a run does not depend on the way its data came.

Source:
  Addresses, sizes and checksums: tensorflow_datasets 4.9.10, url_checksums and
  datasets/svhn_cropped/checksums.tsv.
"""

from collections.abc import Callable, Mapping, Sequence
import gzip
import hashlib
import http.client
import os
import pathlib
import tarfile
from typing import Any, NamedTuple
import urllib.error
import urllib.request

import numpy as np

from powerprop_jax.core import names
from powerprop_jax.train import progress as progress_lib
from powerprop_jax.train.data.sources import Arrays
from powerprop_jax.train.runs.errors import UserError

_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 1 << 18


class File(NamedTuple):
  """A published file.

  Attributes:
    url: where it is.
    size: its bytes.
    sha256: its checksum, hexadecimal.
  """

  url: str
  size: int
  sha256: str


class Published(NamedTuple):
  """A data set as it is published.

  Attributes:
    files: what to download.
    read: from the paths of these files to the examples to train and to test on,
      uint8 [N, H, W, C] and labels, in their own order.
  """

  files: tuple[File, ...]
  read: Callable[[Sequence[pathlib.Path]], tuple[Arrays, Arrays]]

  @property
  def size(self) -> int:
    """Bytes to download."""
    return sum(file.size for file in self.files)


def get(
  name: str,
  folder: pathlib.Path,
  *,
  published: Published | None = None,
  show_progress: bool = False,
) -> pathlib.Path:
  """Downloads a data set, unless it is there; the path of its .npz file.

  What is finished stays in folder/downloads until all of it is, so that the
  same call goes on after an interruption. The .npz file appears when it is
  complete.

  Args:
    name: one of PUBLISHED.
    folder: made if missing.
    published: another set, under that name.

  Raises:
    UserError: if the name is unknown, a file cannot be had, or one is not what
      was published.
  """
  if published is None:
    check_known(name)
    published = PUBLISHED[name]
  path = folder / f'{name}.npz'
  if path.exists():
    return path
  downloads = folder / 'downloads'
  downloads.mkdir(parents=True, exist_ok=True)
  paths = [downloads / f'{name}_{_base(file)}' for file in published.files]
  description = f'downloading {name}' if show_progress else ''
  total = published.size // 1000
  with progress_lib.Progress(description, total, unit='kB') as progress:
    done = 0
    for file, place in zip(published.files, paths, strict=True):
      fetch(file, place, _counted(progress, done))
      done += file.size
  arrays: dict[str, Any] = {}
  train, test = published.read(paths)
  for split, found in {'train': train, 'test': test}.items():
    order = tfds_order(split, len(found.labels))
    arrays[f'x_{split}'] = found.images[order]
    arrays[f'y_{split}'] = found.labels[order]
  part = downloads / path.name
  np.savez(part, **arrays)
  os.replace(part, path)
  for place in paths:
    place.unlink()
  if not any(downloads.iterdir()):
    downloads.rmdir()
  return path


def _counted(
  progress: progress_lib.Progress, done: int
) -> Callable[[int], None]:
  return lambda size: progress.update((done + size) // 1000)


def check_known(name: str) -> None:
  """Refuses a data set that is not among those with a known address."""
  if name not in PUBLISHED:
    raise UserError(
      f'{name!r} cannot be downloaded.{names.hint(name, PUBLISHED)} There are: '
      f'{", ".join(PUBLISHED)}.'
    )


def fetch(
  file: File, path: pathlib.Path, progress: Callable[[int], None]
) -> None:
  """Downloads a file, from where it was broken off, and checks it.

  Until it is complete and checked it is called PATH.part. A connection that
  breaks is opened again as long as that brings something new.

  Args:
    progress: called with the number of bytes that are there.

  Raises:
    UserError: if it cannot be had, when what there is stays for the next time;
      or if it is not the published one, when nothing stays.
  """
  if path.exists():
    progress(file.size)
    return
  part = path.with_name(f'{path.name}.part')
  while (before := _size(part)) < file.size:
    reason = _append(file, part, progress)
    if _size(part) <= before:
      raise UserError(
        f'cannot download {file.url}: {reason}. {_size(part):,} of '
        f'{file.size:,} bytes are kept; the same command goes on from there.'
      )
  found = hashlib.sha256(part.read_bytes()).hexdigest()
  if found != file.sha256:
    size = _size(part)
    part.unlink()
    raise UserError(
      f'{file.url} is not the file that was published, and was deleted: it has '
      f'{size:,} bytes and the SHA-256 {found}, expected are {file.size:,} and '
      f'{file.sha256}.'
    )
  os.replace(part, path)


def _append(
  file: File, part: pathlib.Path, progress: Callable[[int], None]
) -> str:
  """Reads on from the end of a part; why it ended before the file did."""
  start = _size(part)
  headers = {'User-Agent': 'powerprop_jax', 'Range': f'bytes={start}-'}
  request = urllib.request.Request(file.url, headers=headers)
  try:
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
      # A server that knows no ranges sends all of it again.
      goes_on = response.status == http.HTTPStatus.PARTIAL_CONTENT
      size = start if goes_on else 0
      with open(part, 'ab' if goes_on else 'wb') as out:
        # One byte more than expected is enough to see that it is another file.
        while size <= file.size and (data := response.read(_CHUNK)):
          out.write(data)
          size += len(data)
          progress(min(size, file.size))
  except urllib.error.HTTPError as error:
    error.close()
    return str(error)
  except (OSError, http.client.HTTPException) as error:
    return str(error)
  return 'the connection ended'


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _base(file: File) -> str:
  return file.url.rpartition('/')[2]


def tfds_order(split: str, count: int) -> list[int]:
  """Positions of the examples of a split, in the order that TFDS has them.

  It sorts by the MD5 of the name of the split and the number of the example.

  Example:
    >>> tfds_order('train', 50_000)[:3]  # of CIFAR-10: train_16399, …
    [16399, 1680, 47917]

  Source:
    tensorflow_datasets 4.9.10, core/hashing.py and core/shuffle.py.
  """
  salt = hashlib.md5(split.encode())

  def key(number: int) -> bytes:
    hashed = salt.copy()
    hashed.update(str(number).encode())
    return hashed.digest()

  return sorted(range(count), key=key)


def _read_idx(paths: Sequence[pathlib.Path]) -> tuple[Arrays, Arrays]:
  """Images and labels to train on, then to test on, in MNIST's format."""

  def array(path: pathlib.Path) -> np.ndarray:
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, '>i4', data[3], 4)
    return np.frombuffer(data, np.uint8, -1, 4 + 4 * data[3]).reshape(shape)

  x_train, y_train, x_test, y_test = map(array, paths)
  return (
    Arrays(x_train[..., None], y_train),
    Arrays(x_test[..., None], y_test),
  )


def _cifar_reader(
  num_labels: int, train: Sequence[str], test: str
) -> Callable[[Sequence[pathlib.Path]], tuple[Arrays, Arrays]]:
  """For CIFAR's binary format, of which the last label of an image counts."""

  def read(paths: Sequence[pathlib.Path]) -> tuple[Arrays, Arrays]:
    with tarfile.open(paths[0]) as archive:
      parts = {
        pathlib.Path(member.name).name: np.frombuffer(file.read(), np.uint8)
        for member in archive
        if (file := archive.extractfile(member))
        and member.name.endswith('.bin')
      }

    def arrays(*names: str) -> Arrays:
      rows = np.concatenate([parts[name] for name in names])
      rows = rows.reshape(-1, num_labels + 3072)
      images = rows[:, num_labels:].reshape(-1, 3, 32, 32)
      return Arrays(images.transpose(0, 2, 3, 1), rows[:, num_labels - 1])

    return arrays(*train), arrays(test)

  return read


def _read_svhn(paths: Sequence[pathlib.Path]) -> tuple[Arrays, Arrays]:
  """MATLAB files; the digit 0 has the label 10."""
  import scipy.io

  def arrays(path: pathlib.Path) -> Arrays:
    found = scipy.io.loadmat(path)
    return Arrays(found['X'].transpose(3, 0, 1, 2), found['y'].ravel() % 10)

  train, test = map(arrays, paths)
  return train, test


def _idx(address: str, *files: tuple[int, str]) -> Published:
  """A set in MNIST's format, with the size and checksum of each file."""
  names = (
    'train-images-idx3-ubyte.gz',
    'train-labels-idx1-ubyte.gz',
    't10k-images-idx3-ubyte.gz',
    't10k-labels-idx1-ubyte.gz',
  )
  return Published(
    tuple(
      File(address + name, size, sha256)
      for name, (size, sha256) in zip(names, files, strict=True)
    ),
    _read_idx,
  )


_CIFAR = 'https://www.cs.toronto.edu/~kriz/'
_BATCHES = [f'data_batch_{number}.bin' for number in range(1, 6)]
_SVHN = 'http://ufldl.stanford.edu/housenumbers/'
# Some are published without encryption; the checksums are what counts.
PUBLISHED: Mapping[str, Published] = {
  'mnist': _idx(
    'https://storage.googleapis.com/cvdf-datasets/mnist/',
    (
      9_912_422,
      '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609',
    ),
    (
      28_881,
      '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c',
    ),
    (
      1_648_877,
      '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6',
    ),
    (
      4_542,
      'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6',
    ),
  ),
  'fashion_mnist': _idx(
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/',
    (
      26_421_880,
      '3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84',
    ),
    (
      29_515,
      'a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845',
    ),
    (
      4_422_102,
      '346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073',
    ),
    (
      5_148,
      '67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5',
    ),
  ),
  'kmnist': _idx(
    'http://codh.rois.ac.jp/kmnist/dataset/kmnist/',
    (
      18_165_135,
      '51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4',
    ),
    (
      29_497,
      'e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17',
    ),
    (
      3_041_136,
      'edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5',
    ),
    (
      5_120,
      '20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c',
    ),
  ),
  'cifar10': Published(
    (
      File(
        _CIFAR + 'cifar-10-binary.tar.gz',
        170_052_171,
        'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd',
      ),
    ),
    _cifar_reader(1, _BATCHES, 'test_batch.bin'),
  ),
  'cifar100': Published(
    (
      File(
        _CIFAR + 'cifar-100-binary.tar.gz',
        168_513_733,
        '58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec',
      ),
    ),
    _cifar_reader(2, ['train.bin'], 'test.bin'),
  ),
  'svhn_cropped': Published(
    (
      File(
        _SVHN + 'train_32x32.mat',
        182_040_794,
        '435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8',
      ),
      File(
        _SVHN + 'test_32x32.mat',
        64_275_384,
        'cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b',
      ),
    ),
    _read_svhn,
  ),
}
