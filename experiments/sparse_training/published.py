"""Accuracies that others published, to show beside ours.

Records with method, density, accuracy and label (the source), as figures and
tables take them; accuracies are of the test
set, for θ = φ. Methods have the names of train/methods.py; published
methods that it lacks are left out.
"""

from collections.abc import Mapping

from powerprop_jax.files.tables import Row

# TimDettmers/sparse_learning, results/MNIST_sparse_summary.csv and, for static
# and pruning, means of the raw runs beside it; LeNet-300-100, 100 epochs.
_SNFS = 'Dettmers & Zettlemoyer, 2019'


def _by_density(*accuracies: float) -> dict[float, float]:
  densities = (0.01, 0.02, 0.03, 0.04, 0.05, 0.1)
  return dict(zip(densities, accuracies, strict=True))


_LENET_300_100 = {
  'dense': {1.0: 0.9869},
  'snfs': _by_density(0.9753, 0.9820, 0.9830, 0.9842, 0.9853, 0.9867),
  'dsr': _by_density(0.9754, 0.9814, 0.9820, 0.9823, 0.9832, 0.9844),
  'set': _by_density(0.9580, 0.9774, 0.9806, 0.9810, 0.9814, 0.9839),
  'static': _by_density(0.495, 0.828, 0.944, 0.941, 0.967, 0.979),
  'pruning': _by_density(0.9747, 0.9812, 0.9834, 0.9842, 0.9847, 0.9855),
}

# The same repository's compression table for LeNet-5, 1 - error.
_LENET_5 = {
  'snfs': {0.004: 0.98597, 0.005: 0.98856, 0.009: 0.99106, 0.01: 0.9917}
  | {0.02: 0.9924, 0.05: 0.9931, 0.08: 0.99355}
}

# WRN-28-2 on CIFAR-10, same repository.
_WRN_28_2 = {
  'dense': {1.0: 0.9470},
  'snfs': {0.1: 0.9361, 0.2: 0.9432, 0.3: 0.9458, 0.4: 0.9468, 0.5: 0.9475},
  'dsr': {0.1: 0.9359, 0.2: 0.9440, 0.3: 0.9457, 0.4: 0.9466, 0.5: 0.9473},
  'set': {0.1: 0.9328, 0.2: 0.9425, 0.3: 0.9440, 0.4: 0.9455, 0.5: 0.9476},
  'static': {0.1: 0.9204, 0.2: 0.9348, 0.3: 0.9387, 0.4: 0.9426, 0.5: 0.9428},
}

# Reproducibility report on RigL (arXiv 2103.15767), 45,000 training images; SET
# and RigL with the distribution ERK, static and pruning with the uniform one.
_RIGL_AGAIN = 'report on RigL, 2021'
_WRN_22_2 = {
  'dense': {1.0: 0.934},
  'static': {0.2: 0.912},
  'set': {0.2: 0.929},
  'rigl': {0.2: 0.931},
  'pruning': {0.2: 0.932},
}

_TABLES: dict[
  tuple[str, str], tuple[Mapping[str, Mapping[float, float]], str]
] = {
  ('lenet_300_100', 'mnist'): (_LENET_300_100, _SNFS),
  ('lenet_5_relu', 'mnist'): (_LENET_5, _SNFS),
  ('wrn_28_2', 'cifar10'): (_WRN_28_2, _SNFS),
  ('wrn_22_2', 'cifar10'): (_WRN_22_2, _RIGL_AGAIN),
}


def sparse_training(net: str, data: str) -> list[Row]:
  """What is published of a network on a data set, perhaps nothing.

  Example:
    >>> sparse_training('lenet_5_relu', 'mnist')[0]['method']
    'snfs'
  """
  table, label = _TABLES.get((net, data), ({}, ''))
  return [
    {'method': method, 'density': d, 'accuracy': accuracy, 'label': label}
    for method, accuracies in table.items()
    for d, accuracy in accuracies.items()
  ]
