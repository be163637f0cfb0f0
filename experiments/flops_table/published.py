"""FLOPs and sizes of sparse networks as others have published them.

Source: ResNet-50: Evci et al., Rigging the lottery, 2020, Figure 2
(https://arxiv.org/abs/1911.11134), and the tables of its code. WRN-22-2: the
report on its reproduction (https://arxiv.org/abs/2103.15767).
"""

# By network, distribution and sparsity: FLOPs of inference relative to dense,
# and 10⁶ bytes. Those of RigL's code where it differs from the paper; sizes in
# it that belong to another distribution are left out.
INFERENCE: dict[tuple[str, str, float], tuple[float | None, float | None]] = {
  ('resnet_50', 'dense', 0.0): (1.0, 102.122),
  ('resnet_50', 'uniform', 0.8): (0.23, None),
  ('resnet_50', 'uniform', 0.9): (0.13, 13.532),
  ('resnet_50', 'uniform', 0.95): (0.08, 8.433),
  ('resnet_50', 'uniform', 0.965): (0.07, 6.904),
  ('resnet_50', 'er', 0.8): (None, 23.685),
  ('resnet_50', 'erk', 0.8): (0.42, 23.683),
  ('resnet_50', 'erk', 0.9): (0.24, 13.499),
  ('resnet_50', 'erk', 0.95): (0.12, 8.399),
  ('resnet_50', 'erk', 0.965): (0.09, None),
  ('resnet_50', 'erk_first_dense', 0.965): (0.11, 6.904),
  ('resnet_50', 'erk_first_dense', 0.99): (0.05, 4.354),
  ('wrn_22_2', 'uniform', 0.8): (0.20, None),
  ('wrn_22_2', 'uniform', 0.9): (0.11, None),
  ('wrn_22_2', 'erk', 0.8): (0.35, None),
  ('wrn_22_2', 'erk', 0.9): (0.17, None),
}

# By network, method and distribution: FLOPs of training relative to dense, by
# sparsity and length.
TRAINING: dict[tuple[str, str, str], dict[tuple[float, float], float]] = {
  ('resnet_50', 'static', 'uniform'): {(0.8, 1): 0.23},
  ('resnet_50', 'snip', 'uniform'): {(0.8, 1): 0.23},
  ('resnet_50', 'set', 'uniform'): {(0.8, 1): 0.23},
  ('resnet_50', 'rigl', 'uniform'): {
    (0.8, 1): 0.23,
    (0.8, 5): 1.14,
    (0.9, 5): 0.66,
    (0.95, 5): 0.42,
  },
  ('resnet_50', 'pruning', 'uniform'): {(0.8, 1): 0.56, (0.9, 1): 0.51},
  ('resnet_50', 'static', 'erk'): {(0.8, 1): 0.42, (0.9, 1): 0.24},
  ('resnet_50', 'rigl', 'erk'): {
    (0.8, 1): 0.42,
    (0.8, 5): 2.09,
    (0.9, 1): 0.25,
    (0.9, 5): 1.23,
    (0.95, 5): 0.63,
  },
  ('resnet_50', 'rigl', 'erk_first_dense'): {
    (0.99, 5): 0.29,
    (0.99, 10): 0.58,
    (0.99, 40): 2.32,
    (0.99, 100): 5.8,
  },
  ('resnet_50', 'snfs', 'erk'): {(0.8, 1): 0.61, (0.9, 1): 0.50},
  ('wrn_22_2', 'static', 'uniform'): {(0.8, 1): 0.20},
  ('wrn_22_2', 'set', 'uniform'): {(0.8, 1): 0.20},
  ('wrn_22_2', 'rigl', 'uniform'): {(0.8, 1): 0.20, (0.8, 2): 0.41},
  ('wrn_22_2', 'set', 'erk'): {(0.8, 1): 0.35},
  ('wrn_22_2', 'rigl', 'erk'): {(0.8, 1): 0.35, (0.8, 2): 0.70},
}
