"""A part of a JPEG file without the rest, by NVIDIA's nvImageCodec.

It needs no GPU here: its copy of libjpeg-turbo leaves out the lines above and
below the part, and the inverse transform of the blocks beside it. The pixels
are those of the whole image.
"""

from collections.abc import Iterator
import contextlib
import os
import sys
import threading
from typing import Any

import numpy as np

# Of each thread: the module, how to decode, and a decoder, which must not be
# used by two at once.
_of_thread = threading.local()
_opening = threading.Lock()


def is_available() -> bool:
  """Whether nvImageCodec is installed, in a version that needs no GPU."""
  try:
    _codec()
  except (ImportError, AttributeError, RuntimeError):
    return False
  return True


def decode(data: bytes, box: tuple[int, int, int, int]) -> np.ndarray | None:
  """A rectangle of a JPEG file, whose rotation, if noted, is ignored.

  The box is (top, left, bottom, right), the last two behind the rectangle.
  Damage below it is not noticed.

  Returns:
    uint8 [bottom - top, right - left, 3], red, green and blue; None if this
    cannot be had of the file, because it is damaged, has four channels or is
    smaller.
  """
  codec = _codec()
  stream = codec.module.CodeStream(data)
  try:
    if stream.num_channels > 3:
      # Others turn black and cyan into red by another rule.
      return None
    region = codec.module.Region(*box)
    part = stream.get_sub_code_stream(region=region)
  except RuntimeError:  # no header that it can read
    return None
  image = codec.decoder.decode(part, params=codec.params)
  # Version 0.9 loses the 32 bytes of an integer here: 41 MB in an epoch of
  # ImageNet, in all workers together.
  return None if image is None else np.asarray(image)


def _codec() -> Any:
  """The module, the decoder and the params of the calling thread."""
  if hasattr(_of_thread, 'params'):
    return _of_thread
  # A file that cannot be decoded is reported by those who ask for it.
  os.environ.setdefault('PYNVIMGCODEC_VERBOSITY', '0')
  with _opening, _quiet():
    from nvidia import nvimgcodec
  _of_thread.module = nvimgcodec
  _of_thread.decoder = nvimgcodec.Decoder(
    device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
    max_num_cpu_threads=1,
    backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
  )
  _of_thread.params = nvimgcodec.DecodeParams(
    apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB
  )
  return _of_thread


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Drops what is written to stderr, by libraries in other languages too.

  nvImageCodec complains about each library for GPUs that is not installed.
  """
  sys.stderr.flush()
  try:
    stderr = os.dup(2)
  except OSError:  # there is none
    yield
    return
  nowhere = os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(nowhere)
    os.close(stderr)
