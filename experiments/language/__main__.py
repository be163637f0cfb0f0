r"""Loss of sparse language models, character by character, against density.

Trains a small GPT with every method, at every density and for every α, as
experiments/sparse_training does, and compares its losses, in nats per
character, on the last tenth of a text.

    python -m experiments.language --out runs/language

The default text is the documentation that comes with Python itself; another is
a file in UTF-8. The recipe of nanoGPT for a CPU, on the plays of Shakespeare
that it is known by:

    python -m experiments.language --preset shakespeare \
        --data.name FILE.txt --out runs/shakespeare

A network of 10.7 million parameters, with its zeros left out:

    python -m experiments.language --preset shakespeare_mini \
        --data.name FILE.txt --execution condensed --out runs/mini

Source: karpathy/nanoGPT, config/train_shakespeare_char.py and README; it has
AdamW with a decay of 0.1, here Adam, and takes the mean over random windows.
"""

import dataclasses

import experiments
from experiments.sparse_training import __main__ as sparse_training
from experiments.sparse_training.config import Config
from powerprop_jax.train.data.splits import DataConfig
from powerprop_jax.train.loop import LoopConfig
from powerprop_jax.train.methods import SparseConfig
from powerprop_jax.train.optimizers import OptimizerConfig


def main(config: Config) -> None:
  """Trains every combination and writes what came out."""
  sparse_training.run(config, 'language')


_PYDOC = Config(
  out='runs/language',
  data=DataConfig('pydoc'),
  net='gpt_small',
  methods=('dense', 'static', 'pruning', 'rigl'),
  densities=(0.1,),
  keys=(0,),
  optimizer=OptimizerConfig(
    name='adam', learning_rate=1e-3, schedule='cosine', warmup_steps=100
  ),
  loop=LoopConfig(
    num_steps=1_000, batch_size=12, eval_every=250, steps_per_dispatch=50
  ),
  sparse=SparseConfig(regrow='smallest'),
)
_SHAKESPEARE = dataclasses.replace(
  _PYDOC,
  keys=(0, 1, 2),
  loop=dataclasses.replace(_PYDOC.loop, num_steps=2_000),
)
PRESETS = {
  'pydoc': _PYDOC,
  'shakespeare': _SHAKESPEARE,
  'shakespeare_mini': dataclasses.replace(
    _SHAKESPEARE,
    data=DataConfig('pydoc', context=128),
    net='gpt_mini',
    methods=('dense', 'rigl'),
    keys=(0,),
    variance=5.0,
    optimizer=dataclasses.replace(_PYDOC.optimizer, b2=0.99),
    loop=LoopConfig(
      num_steps=2_000, batch_size=16, eval_every=500, steps_per_dispatch=10
    ),
    sparse=SparseConfig(distribution='uniform', period=50),
  ),
}


if __name__ == '__main__':
  experiments.start(main, PRESETS, static_alpha=True)
