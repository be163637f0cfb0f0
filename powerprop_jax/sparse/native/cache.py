"""Files kept for the next programs of this user: kernels, measurements.

They lie in $POWERPROP_CACHE_DIR, or powerprop_jax under $XDG_CACHE_HOME or
~/.cache. What is kept is run, so nothing is read that another user could have
put there: the folder (where it really is, behind symbolic links) and the file
(an ordinary one, no link) belong to the effective user, and group and others
may not write to either. The folders above are not looked at: who may rename
there can put a folder in this one's place, but it is theirs, and refused unless
they do so between the check and the use. Root is trusted.
"""

import hashlib
import os
import pathlib
import stat
import tempfile


def folder() -> pathlib.Path:
  """Where the files are kept, an absolute path; it need not exist.

  Raises:
    OSError: if no folder is named and this user has no home.
  """
  chosen = os.environ.get('POWERPROP_CACHE_DIR')
  base = os.environ.get('XDG_CACHE_HOME')
  if not chosen and not base:
    try:
      base = str(pathlib.Path.home() / '.cache')
    except RuntimeError as error:
      raise OSError('this user has no home to keep files in') from error
  return pathlib.Path(os.path.realpath(chosen or f'{base}/powerprop_jax'))


def digest(*parts: bytes) -> str:
  """Sixteen characters that tell contents from others, for names of files."""
  return hashlib.sha256(b'\n'.join(parts)).hexdigest()[:16]


def read(name: str) -> bytes:
  """The contents of a file.

  Raises:
    OSError: if there is none, or others could have put it there.
  """
  path = folder() / name
  _check_own(path.parent)
  if not stat.S_ISREG(path.lstat().st_mode):
    raise OSError(f'{path} is no ordinary file')
  _check_own(path)
  return path.read_bytes()


def write(name: str, data: bytes) -> pathlib.Path:
  """Makes or replaces a file, whole or not at all; several programs may.

  Raises:
    OSError: if that cannot be done, or others could put another in its place.
  """
  path = folder() / name
  path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
  _check_own(path.parent)
  # In a folder that is removed whatever happens.
  with tempfile.TemporaryDirectory(dir=path.parent) as place:
    made = pathlib.Path(place) / name
    with made.open('wb') as file:
      file.write(data)
      file.flush()
      # Or the name may outlive a crash of the machine, and the contents not.
      os.fsync(file.fileno())
    made.chmod(0o600)
    os.replace(made, path)
  return path


def _check_own(path: pathlib.Path) -> None:
  found = path.lstat()
  if os.name != 'posix':  # Windows has neither.
    return
  if found.st_uid != os.geteuid():
    raise PermissionError(
      f'{path} belongs to user {found.st_uid}, not to {os.geteuid()}'
    )
  if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    raise PermissionError(
      f'{path} may be written by other users (see chmod go-w)'
    )
