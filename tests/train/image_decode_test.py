"""Crops lie in the image, and decoders give the pixels that files have."""

import concurrent.futures
import functools
import io
import sys
import threading
import types
from unittest import mock

import image_files
import numpy as np
from PIL import Image
import processes
import pytest

from powerprop_jax.train.images import crops as image_crops
from powerprop_jax.train.images import decode, image_set, regions
from powerprop_jax.train.images.crops import Crop
from powerprop_jax.train.images.decode import CorruptImageError
from powerprop_jax.train.runs.errors import UserError

SIZES = [(1, 1), (1, 300), (300, 1), (50, 40), (375, 500)]


def decoders(*names):
  """Decoders to test with; those that are not installed are skipped."""
  return [
    pytest.param(
      name,
      marks=pytest.mark.skipif(
        name not in decode.installed(), reason=f'{name} is not installed'
      ),
    )
    for name in names
  ]


each = pytest.mark.parametrize('decoder', decoders(*decode.DECODERS))


def difference(a, b):
  assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
  return np.abs(a.astype(int) - b).max()


class CropsTest:
  @pytest.mark.parametrize('size', SIZES)
  def test_crops_lie_in_the_image_central_ones_in_the_centre(self, size):
    for draws in image_crops.random_draws(0, 0, 200):
      crop = image_crops.random_crop(draws, *size)
      assert min(crop[:2]) >= 0 and min(crop[2:4]) >= 1
      assert crop.top + crop.height <= size[0]
      assert crop.left + crop.width <= size[1]
    crop = image_crops.central_crop(*size)
    assert crop.height == crop.width == max(1, round(0.875 * min(size)))
    below = size[0] - crop.top - crop.height
    right = size[1] - crop.left - crop.width
    assert 0 <= below - crop.top <= 1 and 0 <= right - crop.left <= 1
    assert not crop.is_mirrored

  def test_random_crops_have_the_distribution_asked_for(self):
    draws = image_crops.random_draws(0, 0, 4000)
    crops = [image_crops.random_crop(each, 500, 500) for each in draws]
    top, left, height, width, is_mirrored = np.array(crops).T
    share, ratio = height * width / 500**2, width / height
    assert 0.075 < share.min() < 0.1 and 0.9 < share.max() <= 1
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35
    # The logarithm of the ratio is symmetric; five standard errors are 0.013.
    assert abs(np.log(ratio).mean()) < 0.013
    assert abs(is_mirrored.mean() - 0.5) < 0.04
    # Anywhere there is room, one end as often as the other.
    for start, length in ((top, height), (left, width)):
      room = (start + 0.5) / (500 - length + 1)
      assert abs(room.mean() - 0.5) < 0.025
      assert room.min() < 0.01 and room.max() > 0.99

    # Where all shapes fit the share is uniform: the distance of Kolmogorov and
    # Smirnov, five times its usual size, in 0.4.
    shares = [
      np.prod(image_crops.random_crop(each, 600, 600, scale=(0.1, 0.5))[2:4])
      for each in draws
    ]
    expected = np.linspace(0.1, 0.5, 4000) * 600**2
    assert np.abs(np.sort(shares) - expected).max() < 0.4 * 0.065 * 600**2

  def test_what_never_fits_is_taken_from_the_centre(self):
    [draws] = image_crops.random_draws(0, 0, 1)
    wide = image_crops.random_crop(draws, 10, 400, scale=(1, 1))
    assert wide[:4] == (0, 193, 10, 13)
    high = image_crops.random_crop(draws, 400, 10, scale=(1, 1))
    assert high[:4] == (193, 0, 13, 10)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('progressive', [False, True])
def test_header_states_the_size(size, progressive):
  pixels = image_files.smooth(0, *size)
  file = image_files.encode(pixels, progressive=progressive)
  assert decode.jpeg_size(file) == size
  # Whatever lies before it, fill bytes included.
  note = b'\xff\xff\xfe\x00\x08\xff\xc0\x00\x01\x02\x03'
  assert decode.jpeg_size(file[:2] + note + file[2:]) == size
  for length in (0, 1, 2, 3, 10, 20):
    assert decode.jpeg_size(file[:length]) is None
  assert decode.jpeg_size(image_files.encode(pixels, 'PNG')) is None
  random = np.random.default_rng(0)
  for _ in range(200):
    decode.jpeg_size(b'\xff\xd8' + random.bytes(30))


def real_files(tfds_dir, count):
  images = image_set.open_set('imagenet2012', tfds_dir, 'validation')
  return [example.data for example in image_set.read(images, range(count))]


class DecodeTest:
  @each
  @pytest.mark.parametrize('size', [*SIZES, (45, 61), (64, 48)])
  def test_pixels_are_red_green_and_blue(self, decoder, size):
    pixels = image_files.smooth(1, *size)
    png = image_files.encode(pixels, 'PNG')
    assert difference(decode.decode(png), pixels) == 0
    jpeg = image_files.encode(pixels, quality=100, subsampling=0)
    assert difference(decode.decode(jpeg), pixels) <= 4
    for file in (png, jpeg):
      square = decode.decode_crop(file, image_crops.central_crop, 8, decoder)
      assert square.shape == (8, 8, 3)

  @each
  def test_colours_are_converted_and_rotations_are_not(self, decoder):
    pixels = image_files.smooth(3, 30, 40)
    file = image_files.encode(pixels, mode='CMYK', quality=100, subsampling=0)
    assert difference(decode.decode(file), pixels) <= 6
    file = image_files.encode(pixels, mode='L')
    square = decode.decode_crop(file, image_crops.central_crop, 16, decoder)
    assert square.shape == (16, 16, 3)
    assert (square == square[..., :1]).all()

    # A rotation that is noted is ignored.
    exif = Image.Exif()
    exif[0x0112] = 6
    file = image_files.encode(pixels, exif=exif)
    assert decode.decode(file).shape == (30, 40, 3)

  @each
  def test_real_files_are_decoded_as_by_pillow(self, decoder, tfds_dir):
    crop = Crop(3, 5, 50, 45, True)
    for file in real_files(tfds_dir, 30):
      image = Image.open(io.BytesIO(file)).convert('RGB')
      pixels = decode.decode(file)
      assert difference(pixels, np.asarray(image)) == 0
      assert decode.jpeg_size(file) == pixels.shape[:2]
      part = image.crop((5, 3, 50, 53)).resize(
        (64, 64), Image.Resampling.BILINEAR
      )
      square = decode.decode_crop(file, lambda *_: crop, 64, decoder)
      assert difference(square, np.asarray(part)[:, ::-1]) <= 2


class DecodeCropTest:
  @each
  @pytest.mark.parametrize('reduction', [1, 2, 4, 8])
  @pytest.mark.parametrize('mirrored', [False, True])
  def test_the_part_is_cut_out_whatever_size_is_decoded(
    self, decoder, reduction, mirrored
  ):
    pixels = image_files.smooth(6, 301, 403)
    crop = Crop(11, 21, 32 * reduction, 32 * reduction, mirrored)
    file = image_files.encode(pixels, quality=100, subsampling=0)
    square = decode.decode_crop(file, lambda *_: crop, 32, decoder)
    # The mean of the pixels that each pixel stands for.
    expected = pixels[11 : 11 + crop.height, 21 : 21 + crop.width].astype(float)
    expected = expected.reshape(32, reduction, 32, reduction, 3).mean((1, 3))
    expected = expected[:, ::-1] if mirrored else expected
    # A crop begins at a multiple of the reduction, up to 7 pixels away.
    slope = np.abs(np.diff(pixels.astype(int), axis=1)).max()
    slope += np.abs(np.diff(pixels.astype(int), axis=0)).max()
    assert np.abs(square - expected).max() <= 4 + (reduction - 1) * slope
    if reduction == 1:  # nothing is lost
      file = image_files.encode(pixels, 'PNG')
      square = decode.decode_crop(file, lambda *_: crop, 32, decoder)
      assert difference(square, expected.astype(np.uint8)) == 0


class CorruptTest:
  FILE = image_files.encode(image_files.smooth(8, 90, 70))

  @each
  @pytest.mark.parametrize(
    'file',
    [
      b'',
      b'\xff',
      b'not an image',
      b'\xff\xd8' + bytes(100),
      FILE[:40],
      FILE[: len(FILE) // 2],
      image_files.encode(image_files.smooth(8, 90, 70), 'PNG')[:60],
    ],
    ids=['empty', 'byte', 'text', 'zeros', 'header', 'half', 'png'],
  )
  @pytest.mark.parametrize('size', [8, 64])
  def test_damage_is_an_error(self, decoder, file, size):
    with pytest.raises(CorruptImageError, match='are no complete image'):
      decode.decode_crop(file, image_crops.central_crop, size, decoder)
    with pytest.raises(CorruptImageError, match=f'^{len(file)} bytes'):
      decode.decode(file)

  @each
  def test_any_change_gives_an_image_or_that_error(self, decoder):
    random = np.random.default_rng(0)
    for _ in range(100):
      file = bytearray(self.FILE)
      for at in random.integers(0, len(file), 4):
        file[at] = random.integers(256)
      try:
        square = decode.decode_crop(
          bytes(file), image_crops.central_crop, 8, decoder
        )
      except CorruptImageError:
        continue
      assert square.shape == (8, 8, 3)


@pytest.mark.parametrize('decoder', decoders('nvimgcodec'))
class RegionTest:
  """What decodes a part alone gives the same pixels as what decodes all."""

  def assert_same(self, file, draws, size, decoder):
    choose = functools.partial(image_crops.random_crop, draws)
    one, other = (
      decode.decode_crop(file, choose, size, d) for d in (decoder, 'opencv')
    )
    assert difference(one, other) == 0

  @pytest.mark.parametrize('size', [224, 64, 8])
  def test_random_crops_of_real_files(self, decoder, size, tfds_dir):
    files, draws = real_files(tfds_dir, 60), image_crops.random_draws(0, 0, 60)
    for file, drawn in zip(files, draws, strict=True):
      self.assert_same(file, drawn, size, decoder)

  @pytest.mark.parametrize('mode', ['RGB', 'L', 'CMYK'])
  @pytest.mark.parametrize(
    'settings',
    [{'subsampling': s} for s in (0, 1, 2)] + [{'progressive': True}],
    ids=str,
  )
  def test_all_kinds_of_files(self, decoder, mode, settings):
    pixels = image_files.smooth(9, 83, 117)
    file = image_files.encode(pixels, mode=mode, **settings)
    for size, drawn in enumerate(image_crops.random_draws(0, 0, 30)):
      self.assert_same(file, drawn, 1 + 3 * size, decoder)

  def test_damage_below_the_part_is_not_noticed(self, decoder):
    pixels = image_files.smooth(8, 160, 70)
    file = image_files.encode(pixels)
    damaged = file[: len(file) * 3 // 4]
    top, bottom = Crop(0, 0, 60, 70, False), Crop(100, 0, 60, 70, False)
    one, other = (
      decode.decode_crop(f, lambda *_: top, 64, decoder)
      for f in (file, damaged)
    )
    assert difference(one, other) == 0
    with pytest.raises(CorruptImageError):
      decode.decode_crop(damaged, lambda *_: bottom, 64, decoder)

  def test_threads_decode_at_once_what_a_file_has(self, decoder):
    file = image_files.encode(image_files.smooth(8, 90, 70))
    whole_image = decode.decode(file)
    assert regions.decode(file, (0, 0, 91, 70)) is None
    assert regions.decode(file, (0, 10, 90, 71)) is None

    def agree(key):
      random = np.random.default_rng(key)
      for _ in range(300):
        top, left = random.integers(0, (60, 50)).tolist()
        part = regions.decode(file, (top, left, top + 25, left + 18))
        expected = whole_image[top : top + 25, left : left + 18]
        assert difference(part, expected) == 0

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      list(pool.map(agree, range(8)))

  def test_nothing_is_printed(self, decoder):
    program = (
      'from powerprop_jax.train.images import regions;'
      'assert regions.decode(b"no image", (0, 0, 1, 1)) is None;'
      'import sys; print("visible", file=sys.stderr)'
    )
    with processes.started('-c', program) as process:
      assert process.communicate() == ('', 'visible\n')


# As where a decoder cannot be made on this machine.
UNUSABLE_CODEC = mock.Mock(Decoder=mock.Mock(side_effect=RuntimeError))


class FastestTest:
  def test_what_is_missing_is_not_used(self, monkeypatch):
    found = {'nv', 'cv2'}
    monkeypatch.setattr(
      decode.importlib.util, 'find_spec', lambda name: name in found or None
    )
    monkeypatch.setattr(decode.regions, 'is_available', lambda: 'nv' in found)
    monkeypatch.setattr(decode, 'installed', decode.installed.__wrapped__)
    for name, module in zip(decode.DECODERS, ('nv', 'cv2'), strict=True):
      assert decode.fastest() == name
      found.remove(module)
    with pytest.raises(UserError, match='OpenCV, which is not installed'):
      decode.fastest()
    found.add('nv')
    assert decode.installed() == ()

  @pytest.mark.parametrize(
    'module', [None, object(), UNUSABLE_CODEC], ids=['none', 'old', 'unusable']
  )
  def test_an_nvimgcodec_that_does_not_work_is_not_used(
    self, monkeypatch, module
  ):
    monkeypatch.setattr(regions, '_of_thread', threading.local())
    monkeypatch.setitem(sys.modules, 'nvidia', types.ModuleType('nvidia'))
    monkeypatch.setitem(sys.modules, 'nvidia.nvimgcodec', module)
    assert not regions.is_available()
