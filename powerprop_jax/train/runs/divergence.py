"""Networks whose numbers are not finite, and inputs that are not scaled.

A network has diverged where a loss that was logged or one of its weights is not
finite. The loop says so once; a program none of whose networks is left ends
with a status that says so; what works with the weights refuses them.
"""

from collections.abc import Iterable, Mapping, Sequence
import os
import sys
from typing import Any

import numpy as np

from powerprop_jax.core import trees
from powerprop_jax.core.trees import Tree
from powerprop_jax.files.tables import Record
from powerprop_jax.report import records as records_lib
from powerprop_jax.train.data import splits as data
from powerprop_jax.train.data.splits import Splits
from powerprop_jax.train.runs.errors import UserError

EXIT_STATUS = 1

# α and key of a network.
Network = tuple[float | None, int | None]
# What lost_leaf says of each network.
Leaves = Mapping[Network, str | None]
Path = str | os.PathLike[str]

_LOSSES = ('loss', 'validation_loss')
_REMEDIES = (
  'A smaller --optimizer.learning-rate, a smaller α or inputs of another scale '
  'may help.'
)
# The root mean square of a feature, from which on it is called not scaled, and
# the examples that are looked at.
_LARGEST_RMS = 30
_NUM_EXAMPLES = 1_000


class Diverged(Exception):  # noqa: N818
  """No network of a run is left; all that was found is written.

  folder.run_main turns it into one line and EXIT_STATUS.

  Example:
    >>> print(Diverged('runs/train', 1))
    error: the network of runs/train diverged; its results and report are
    written.
  """

  def __init__(self, path: Path, count: int):
    which = 'the network' if count == 1 else f'each of the {count:,} networks'
    super().__init__(
      f'error: {which} of {os.fspath(path)} diverged; its results and report '
      'are written.'
    )


class Watch:
  """Says once of each network of a run that it has diverged."""

  def __init__(self, path: Path):
    """Nothing has been said yet of the run in that folder."""
    self._path = os.fspath(path)
    self._said: set[Network] = set()

  def look(self, logged: Iterable[Record]) -> None:
    """Says which networks have diverged and had not before, by their losses."""
    for record in logged:
      network, step = _network(record), record['step']
      if _is_lost(record) and network not in self._said:
        self._said.add(network)
        _say(network, self._path, f'by step {step:,} its loss is not finite')


def say_weights(
  path: Path, leaves: Leaves, step: int, logged: Sequence[Record] = ()
) -> list[bool]:
  """Which networks of a run diverged, by their weights or what was logged last.

  A line is printed about each of which a Watch could not say it, as the losses
  that were logged did not show it.
  """
  known = lost(logged)
  for network, leaf in leaves.items():
    if leaf is not None and not known.get(network):
      what = f'after step {step:,} its leaf {leaf!r} is not finite'
      _say(network, os.fspath(path), what)
  return [
    leaf is not None or known.get(network, False)
    for network, leaf in leaves.items()
  ]


def lost(logged: Sequence[Record]) -> dict[Network, bool]:
  """Whether a loss of each network was not finite at the last step logged.

  The records are those of metrics.jsonl.

  Example:
    >>> lost([{'step': 20, 'alpha': 2.0, 'key': 0, 'loss': None}])
    {(2.0, 0): True}
  """
  last = max((record['step'] for record in logged), default=0)
  return {
    _network(record): _is_lost(record)
    for record in logged
    if record['step'] == last and any(name in record for name in _LOSSES)
  }


def check_any_left(path: Path, are_lost: Sequence[bool]) -> None:
  """Raises Diverged if all networks of a run did; call it last."""
  if are_lost and all(are_lost):
    raise Diverged(path, len(are_lost))


def lost_leaf(tree: Tree) -> str | None:
  """Name of the first leaf that holds a number that is not finite.

  Example:
    >>> lost_leaf({'linear': {'b': np.ones(2), 'w': np.array([1.0, np.nan])}})
    'linear/w'
  """
  for leaf in trees.named_leaves(tree):
    if not trees.all_finite(leaf.value):
      return leaf.path
  return None


def refuse(path: Path, network: Network, leaf: str | None) -> None:
  """Refuses a network of which lost_leaf found a leaf."""
  if leaf is not None:
    raise UserError(
      f'{name(network)} of {os.fspath(path)} diverged: its leaf {leaf!r} is '
      f'not finite. Train it again. {_REMEDIES}'
    )


def say_scale(splits: Splits, prepare: Any = data.to_float) -> None:
  """Says so where inputs are plainly not scaled.

  The measure is the root mean square of that feature, or pixel, where it is
  largest: 1 after standardising, at most 1 where images are in [0, 1].
  """
  images = np.asarray(prepare(splits.train.images[:_NUM_EXAMPLES]), np.float64)
  if splits.is_text:
    return
  largest = float(np.sqrt(np.mean(np.square(images), axis=0)).max())
  if largest > _LARGEST_RMS:
    print(
      f'note: the inputs of {splits.name} are not scaled: the root mean square '
      f'of a feature is {largest:,.4g}, where about 1 is usual. Scale the '
      'features, e.g. divide them by 255 or standardise them.',
      file=sys.stderr,
      flush=True,
    )


def name(network: Network) -> str:
  """What messages call a network.

  Example:
    >>> name((2.0, 0))
    'α = 2, key 0'
  """
  alpha, key = network
  parts = [f'α = {alpha:g}'] if alpha is not None else []
  parts += [f'key {key}'] if key is not None else []
  return ', '.join(parts) or 'the network'


def _network(record: Record) -> Network:
  return record.get('alpha', record.get('start_alpha')), record.get('key')


def _is_lost(record: Record) -> bool:
  return not all(
    records_lib.is_finite(record[name]) for name in _LOSSES if name in record
  )


def _say(network: Network, path: str, what: str) -> None:
  print(
    f'note: {name(network)} of {path} diverged: {what}. {_REMEDIES}',
    file=sys.stderr,
    flush=True,
  )
