"""Writing a file so that a reader never sees half of it."""

import os
import pathlib
import tempfile


def write_bytes(path: str | os.PathLike[str], data: bytes) -> pathlib.Path:
  """Writes a file in one step: the old one stays until the new is complete."""
  path = pathlib.Path(path)
  descriptor, temporary = tempfile.mkstemp(
    dir=path.parent, prefix=f'.{path.name}.'
  )
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
    # mkstemp makes files private; a report is as readable as its neighbours.
    os.chmod(temporary, 0o666 & ~_umask())
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise
  return path


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask
