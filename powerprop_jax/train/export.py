"""A trained network in a single file, for use without this library.

An .npz file with, for each leaf, the arrays

    theta/MODULE/NAME      what the network computes with, zero where no
                           connection is; float32
    masks/MODULE/NAME      which connections exist; booleans
    net_state/MODULE/NAME  running statistics of the norms; float32

and `about`, a string of JSON: settings, step and scores. numpy.load reads it.
"""

from collections.abc import Mapping
import io
import json
import os
import pathlib
from typing import Any, NamedTuple
import zipfile

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from powerprop_jax.core import masks as masks_lib
from powerprop_jax.core import trees
from powerprop_jax.report import files
from powerprop_jax.train import json_files
from powerprop_jax.train.errors import UserError

_ABOUT = 'about'


class Exported(NamedTuple):
  """A network as the file holds it.

  Attributes:
    theta: effective parameters.
    masks: booleans like them.
    net_state: state of the network, to evaluate it with.
    about: settings, step, scores: what JSON holds.
  """

  theta: hk.Params
  masks: Any
  net_state: hk.State
  about: dict[str, Any]


def write(path: str | os.PathLike[str], exported: Exported) -> pathlib.Path:
  """Writes the file; an old one stays until the new one is complete.

  Args:
    path: the file, usually *.npz; its folder must exist.
    exported: the network, in the memory of this host.

  Returns:
    The path.

  Raises:
    ValueError: if masks are not like theta.

  Example:
    >>> import tempfile
    >>> theta = {'linear': {'w': jnp.array([[2., 0.]])}}
    >>> masks = {'linear': {'w': jnp.array([[True, False]])}}
    >>> path = pathlib.Path(tempfile.mkdtemp()) / 'net.npz'
    >>> _ = write(path, Exported(theta, masks, {}, {'step': 3}))
    >>> read(path).theta['linear']['w'], read(path).about
    (Array([[2., 0.]], dtype=float32), {'step': 3})
  """
  theta, masks, net_state, about = exported
  masks_lib.check_same_shapes(theta, masks, 'theta', 'masks')
  arrays = {_ABOUT: np.array(json.dumps(json_files.to_json(about)))}
  for part, tree in _parts(theta, masks, net_state).items():
    for leaf in trees.named_leaves(tree):
      arrays[f'{part}/{leaf.path}'] = np.asarray(leaf.value)
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)  # type: ignore[arg-type]
  return files.write_bytes(path, buffer.getvalue())


def read(path: str | os.PathLike[str]) -> Exported:
  """Reads the file.

  Args:
    path: the file.

  Returns:
    The network, on the default device.

  Raises:
    UserError: if there is no such file, or it is none that write wrote.
  """
  trees_found: dict[str, dict[str, dict[str, jax.Array]]] = {
    part: {} for part in _parts({}, {}, {})
  }
  try:
    with np.load(path) as arrays:
      about = json.loads(str(arrays[_ABOUT]))
      for name in arrays.files:
        if name == _ABOUT:
          continue
        part, _, leaf_path = name.partition('/')
        module, _, leaf = leaf_path.rpartition('/')
        value = jnp.asarray(arrays[name])
        trees_found[part].setdefault(module, {})[leaf] = value
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise UserError(
      f'cannot read {os.fspath(path)} as an exported network: {error}. Give '
      'the best.npz of a run.'
    ) from error
  return Exported(
    trees_found['theta'],
    trees_found['masks'],
    trees_found['net_state'],
    about,
  )


def _parts(theta: Any, masks: Any, net_state: Any) -> Mapping[str, Any]:
  return {'theta': theta, 'masks': masks, 'net_state': net_state}
