"""Downloads go on where they broke off; only what was published is used."""

import gzip
import hashlib
import http.server
import io
import re
import tarfile
import threading

import numpy as np
import programs
import pytest

from powerprop_jax.train.data import downloads, sources
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.downloads import File, Published
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.runs.errors import UserError


class Server(http.server.ThreadingHTTPServer):
  """Serves files, and remembers which byte each request began with.

  Attributes:
    files: their bytes, by path.
    cut: bytes after which connections end; None sends all.
    knows_ranges: whether requests may begin in the middle.
  """

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.files, self.starts = {}, []
    self.cut, self.knows_ranges = None, True

  def publish(self, name, content):
    """The file as a published one."""
    self.files[f'/{name}'] = content
    url = f'http://127.0.0.1:{self.server_port}/{name}'
    return File(url, len(content), hashlib.sha256(content).hexdigest())


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    content = self.server.files.get(self.path)
    if content is None:
      self.send_error(404)
      return
    start = int(re.match(r'bytes=(\d+)-$', self.headers['Range'])[1])
    self.server.starts.append(start)
    start = start if self.server.knows_ranges else 0
    self.send_response(206 if self.server.knows_ranges else 200)
    self.send_header('Content-Length', str(len(content) - start))
    self.end_headers()
    stop = None if self.server.cut is None else start + self.server.cut
    self.wfile.write(content[start:stop])

  def log_message(self, *_):
    pass


@pytest.fixture
def server():
  with Server() as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()


CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 700_000, np.uint8))


def fetch(file, path):
  seen = []
  downloads.fetch(file, path, seen.append)
  return seen


def refusal(*args):
  with pytest.raises(UserError) as caught:
    fetch(*args)
  return str(caught.value)


class FetchTest:
  def test_a_file_comes_whole(self, server, tmp_path):
    file = server.publish('f', CONTENT)
    seen = fetch(file, tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == CONTENT
    assert seen[-1] == len(CONTENT)
    assert seen == sorted(seen)
    # It is not asked for again.
    assert fetch(file, tmp_path / 'f') == [len(CONTENT)]
    assert server.starts == [0]
    assert [path.name for path in tmp_path.iterdir()] == ['f']

  def test_a_connection_that_breaks_is_opened_again(self, server, tmp_path):
    server.cut = 300_000
    fetch(server.publish('f', CONTENT), tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == CONTENT
    assert server.starts == [0, 300_000, 600_000]

  def test_what_an_earlier_download_left_is_not_asked_for(
    self, server, tmp_path
  ):
    (tmp_path / 'f.part').write_bytes(CONTENT[:123_456])
    fetch(server.publish('f', CONTENT), tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == CONTENT
    assert server.starts == [123_456]

  def test_a_server_without_ranges_sends_all_again(self, server, tmp_path):
    server.knows_ranges = False
    (tmp_path / 'f.part').write_bytes(CONTENT[:1000])
    fetch(server.publish('f', CONTENT), tmp_path / 'f')
    assert (tmp_path / 'f').read_bytes() == CONTENT

  def test_what_arrived_before_the_server_was_gone_is_kept(
    self, server, tmp_path
  ):
    file = server.publish('f', CONTENT)
    (tmp_path / 'f.part').write_bytes(CONTENT[:1000])
    server.cut = 0
    message = refusal(file, tmp_path / 'f')
    assert '1,000 of 700,000 bytes are kept' in message
    assert (tmp_path / 'f.part').read_bytes() == CONTENT[:1000]
    del server.files['/f']
    assert f'cannot download {file.url}: HTTP Error 404' in refusal(
      file, tmp_path / 'f'
    )
    assert not (tmp_path / 'f').exists()

  @pytest.mark.parametrize('size', [699_999, 700_000, 900_000])
  def test_another_file_is_refused_and_not_left(self, server, tmp_path, size):
    file = server.publish('f', CONTENT)
    other = (b'x' + CONTENT[1:] + CONTENT)[:size]
    server.publish('f', other)
    expected = size
    if size < file.size:  # and then nothing more comes
      server.cut = size
      message = refusal(file, tmp_path / 'f')
      assert '699,999 of 700,000 bytes are kept' in message
      return
    message = refusal(file, tmp_path / 'f')
    assert 'is not the file that was published, and was deleted' in message
    assert f'it has {expected:,} bytes' in message or size > file.size
    assert file.sha256 in message
    assert list(tmp_path.iterdir()) == []


def idx(array):
  """MNIST's format."""
  head = np.array([8 * 256 + array.ndim, *array.shape], '>i4')
  return gzip.compress(head.tobytes() + array.tobytes(), 1, mtime=0)


def mnist_files(server, arrays):
  keys = ('x_train', 'y_train', 'x_test', 'y_test')
  return tuple(server.publish(key, idx(arrays[key])) for key in keys)


class GetTest:
  def arrays(self):
    draw = np.random.default_rng(1).integers
    return {
      'x_train': draw(0, 256, (40, 5, 6), np.uint8),
      'y_train': draw(0, 3, 40, np.uint8),
      'x_test': draw(0, 256, (9, 5, 6), np.uint8),
      'y_test': draw(0, 3, 9, np.uint8),
    }

  def test_images_come_in_the_order_of_tfds_and_are_read_by_name(
    self, server, tmp_path
  ):
    arrays = self.arrays()
    files = mnist_files(server, arrays)
    published = Published(files, downloads.PUBLISHED['mnist'].read)
    server.cut = 50
    path = downloads.get('mnist', tmp_path / 'sets', published=published)
    assert [p.name for p in (tmp_path / 'sets').iterdir()] == ['mnist.npz']
    splits = data.load(DataConfig('mnist', str(tmp_path / 'sets')))
    assert splits.name == 'mnist'
    order = downloads.tfds_order('train', 40)
    images = np.concatenate([splits.train.images, splits.validation.images])
    np.testing.assert_array_equal(images[..., 0], arrays['x_train'][order])
    order = downloads.tfds_order('test', 9)
    np.testing.assert_array_equal(splits.test.labels, arrays['y_test'][order])
    # It is there, and nothing is asked for again.
    server.files = {}
    assert downloads.get('mnist', tmp_path / 'sets', published=published) == (
      path
    )

  def test_finished_files_stay_until_all_are_there(self, server, tmp_path):
    files = mnist_files(server, self.arrays())
    wrong = (*files[:3], files[3]._replace(sha256='0' * 64))
    read = downloads.PUBLISHED['mnist'].read
    with pytest.raises(UserError, match='is not the file that was published'):
      downloads.get('mnist', tmp_path, published=Published(wrong, read))
    assert not (tmp_path / 'mnist.npz').exists()
    kept = sorted(path.name for path in (tmp_path / 'downloads').iterdir())
    assert kept == ['mnist_x_test', 'mnist_x_train', 'mnist_y_train']
    server.starts.clear()
    downloads.get('mnist', tmp_path, published=Published(files, read))
    assert server.starts == [0]
    assert not (tmp_path / 'downloads').exists()

  @pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
  def test_cifar_is_read(self, server, tmp_path, name):
    num_labels = {'cifar10': 1, 'cifar100': 2}[name]
    names = {
      'cifar10': [f'data_batch_{n}.bin' for n in range(1, 6)],
      'cifar100': ['train.bin'],
    }[name]
    rows = np.random.default_rng(2).integers(0, 9, (12, 3074), np.uint8)
    rows = rows[:, : num_labels + 3072]
    parts = dict(zip(names, np.array_split(rows[:10], len(names)), strict=True))
    test = {'cifar10': 'test_batch.bin', 'cifar100': 'test.bin'}[name]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w:gz') as archive:
      for part, content in {**parts, test: rows[10:]}.items():
        info = tarfile.TarInfo(f'cifar/{part}')
        info.size = content.nbytes
        archive.addfile(info, io.BytesIO(content.tobytes()))
    published = Published(
      (server.publish('archive', file.getvalue()),),
      downloads.PUBLISHED[name].read,
    )
    path = downloads.get(name, tmp_path, published=published)
    found = np.load(path)
    order = downloads.tfds_order('train', 10)
    assert found['x_train'].shape == (10, 32, 32, 3)
    red = rows[order, num_labels : num_labels + 1024].reshape(10, 32, 32)
    np.testing.assert_array_equal(found['x_train'][..., 0], red)
    labels = rows[order, num_labels - 1]
    np.testing.assert_array_equal(found['y_train'], labels)

  def test_svhn_is_read(self, server, tmp_path):
    import scipy.io

    images = np.random.default_rng(3).integers(0, 256, (4, 4, 3, 7), np.uint8)
    labels = np.array([[1, 10, 3, 10, 5, 6, 7]], np.uint8).T
    files = []
    for split in ('train', 'test'):
      file = io.BytesIO()
      scipy.io.savemat(file, {'X': images, 'y': labels})
      files.append(server.publish(split, file.getvalue()))
    read = downloads.PUBLISHED['svhn_cropped'].read
    published = Published(tuple(files), read)
    found = np.load(downloads.get('svhn', tmp_path, published=published))
    order = downloads.tfds_order('test', 7)
    assert found['y_test'].tolist() == (labels[order, 0] % 10).tolist()
    np.testing.assert_array_equal(found['x_test'][0], images[..., order[0]])


@pytest.mark.slow
def test_mnist_is_that_of_tfds_from_the_files_that_are_published(
  server, tfds_dir, tmp_path
):
  theirs = sources.tfds('mnist', tfds_dir)
  arrays = {}
  for split, found in (('train', theirs.train), ('test', theirs.test)):
    order = downloads.tfds_order(split, len(found.labels))
    for key, values in (('x', found.images[..., 0]), ('y', found.labels)):
      arrays[f'{key}_{split}'] = original = np.empty_like(values, np.uint8)
      original[order] = values
  digests = [
    hashlib.md5(gzip.decompress(idx(arrays[key]))).hexdigest() for key in MD5
  ]
  assert digests == list(MD5.values())
  files = mnist_files(server, arrays)
  published = Published(files, downloads.PUBLISHED['mnist'].read)
  downloads.get('mnist', tmp_path, published=published)
  ours = sources.named('mnist', str(tmp_path))
  for split in ('train', 'test'):
    for a, b in zip(getattr(ours, split), getattr(theirs, split), strict=True):
      np.testing.assert_array_equal(a, b)


# Of the published files, unpacked.
MD5 = {
  'x_train': '6bbc9ace898e44ae57da46a324031adb',
  'y_train': 'a25bea736e30d166cdddb491f175f624',
  'x_test': '2646ac647ad5339dbf082846283269ea',
  'y_test': '27ae3e4e09519cfbb04c329615203637',
}


def test_every_set_that_messages_name_can_be_downloaded():
  assert tuple(downloads.PUBLISHED) == sources.DOWNLOADABLE
  for published in downloads.PUBLISHED.values():
    for file in published.files:
      assert re.fullmatch('[0-9a-f]{64}', file.sha256)
      assert file.size > 1000


def test_sizes_and_checksums_are_those_of_tfds():
  tensorflow_datasets = pytest.importorskip('tensorflow_datasets')
  (root,) = tensorflow_datasets.__path__
  for name, published in downloads.PUBLISHED.items():
    path = f'{root}/url_checksums/{name}.txt'
    if name == 'svhn_cropped':
      path = f'{root}/datasets/{name}/checksums.tsv'
    with open(path) as lines:
      theirs = {tuple(line.strip().split('\t')[:3]) for line in lines}
    ours = {(f.url, str(f.size), f.sha256) for f in published.files}
    assert ours <= theirs


class CommandTest:
  def test_lists_what_is_there_and_how_to_get_the_rest(self, tmp_path, capsys):
    np.savez(tmp_path / 'mnist.npz', x_train=np.zeros(10))
    (tmp_path / 'emnist/letters/3.1.0').mkdir(parents=True)
    (tmp_path / 'emnist/letters/3.1.0/dataset_info.json').write_text('{}')
    assert programs.powerprop('data', '--dir', tmp_path) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert str(tmp_path / 'mnist.npz') in lines['mnist']
    assert f'powerprop data get cifar10 --dir {tmp_path}' in lines['cifar10']
    assert '170.1' in lines['cifar10']
    assert 'not in ArrayRecord form' in lines['emnist/letters']
    assert 'image-net.org' in lines['imagenet2012']

  def test_finds_the_folder_of_the_environment(
    self, tmp_path, capsys, monkeypatch
  ):
    monkeypatch.setenv('POWERPROP_TFDS_DIR', str(tmp_path))
    assert programs.powerprop('data') == 0
    assert f'Data sets in {tmp_path}' in capsys.readouterr().out
    with pytest.raises(UserError, match=f'--dir {tmp_path}'):
      data.load(DataConfig('mnist'))
