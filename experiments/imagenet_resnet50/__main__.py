r"""ResNet-50 on ImageNet: dense, pruned or trained sparse; powerprop or not.

    python -m experiments.imagenet_resnet50 --preset rigl_90_erk_powerprop \
        --data.dir ~/tensorflow_datasets --net.half bfloat16 --out runs/rigl_90

A preset is METHOD_SPARSITY_ALLOCATION or, with α > 1, the same followed by
_powerprop; --recipe.length 5 trains five times as long. On many machines:

    srun python -m experiments.imagenet_resnet50 --preset rigl_90_erk \
        --hosts.coordinator cluster --mesh.mode sharded --out runs/rigl_90

On one machine, for a network that every process of two has a part in:

    python -m powerprop_jax.train.scale.distributed --count 2 -- \
        python -m experiments.imagenet_resnet50 --preset tiny --data.synthetic

Many runs, such as three keys of seven presets: experiments/launch.

A run that was stopped goes on with --resume, on any number of devices and hosts
that can share a batch. When it is done, or at any time:

    python -m experiments.imagenet_resnet50 --evaluate runs/rigl_90
    python -m experiments.imagenet_resnet50 --evaluate runs/rigl_90/best.npz

best.npz is the network of the best evaluation (export/export.py says what is in
it): the running mean of θ with --recipe.ema, else θ. results.json and the
report have the scores of the last step.

The same eight steps of a small network, which mean nothing but that it works:

    python -m experiments.imagenet_resnet50 --preset tiny --data.synthetic \
        --out runs/tiny

Expected: accuracies of others stand in the report beside ours. Of ours, there
are none yet at this size.

Source: Evci et al., Rigging the lottery, 2020 (recipe, section 4.1); Schwarz et
al., Powerpropagation, 2021 (the comparison).
"""

import pathlib
import sys

import jax

from experiments.imagenet_resnet50 import report
from experiments.imagenet_resnet50 import run as image_run
from experiments.imagenet_resnet50.config import (
  PRESETS,
  PROGRAM,
  Config,
  from_identity,
  identity,
)
from powerprop_jax.export import export
from powerprop_jax.files import tables
from powerprop_jax.files.tables import Row
from powerprop_jax.train.checkpoints import checkpoint
from powerprop_jax.train.cli import arguments
from powerprop_jax.train.runs import folder as run_folder
from powerprop_jax.train.runs import writers
from powerprop_jax.train.runs.errors import UserError
from powerprop_jax.train.scale import distributed, stream_loop

_PRESET_NAMES = (
  'A preset is METHOD_SPARSITY_ALLOCATION, such as rigl_90_erk, with 80, 90 or '
  '95 % zeros, uniform or erk, or dense; with α > 1 the same followed by '
  '_powerprop. tiny is a small network for a few steps.'
)


def main(config: Config) -> None:
  """Trains a network, or evaluates one, and says how good it is."""
  distributed.initialise(config.hosts)
  if config.evaluate:
    _evaluate(config)
    return
  settings = identity(config)
  distributed.check_agreement(settings)
  run = image_run.assemble(config)
  folder = image_run.open_folder(
    config.out,
    settings,
    resume=config.resume,
    page=report.page(title(config)),
  )
  evaluation = image_run.Evaluation(run, image_run.Best(folder, settings, run))
  with run.stream(run.images.train) as stream:
    state = stream_loop.fit(
      run.create(),
      step=run.jitted_step(),
      stream=stream,
      evaluate=evaluation,
      config=stream_loop.StreamLoopConfig(
        num_steps=config.recipe.total_steps,
        log_every=config.log_every,
        eval_every=config.eval_every,
        save_every=config.save_every,
        max_skipped=config.max_skipped,
      ),
      folder=folder,
      template=run.template(),
      description=title(config),
      writers=writers.of_run(folder, config),
    )
  record = {**_place(config), **evaluation.final(state)}
  if jax.process_index():
    return
  print(f'\n{tables.text_table([record])}')
  folder.write_results([record])
  page = report.write(folder, config)
  folder.mark_complete()
  print(f'\nReport: {page}')


def title(config: Config) -> str:
  """What is trained, in a few words."""
  name = 'random images' if config.data.synthetic else config.data.name
  words = [f'ResNet-{config.net.depth} on {name}', config.method]
  if config.method != 'dense':
    words += [f'sparsity {config.sparsity:g}', config.allocation]
  return ', '.join([*words, f'α = {config.alpha:g}'])


def _place(config: Config) -> Row:
  """What tells this run from others."""
  return {
    'method': config.method,
    'sparsity': config.sparsity,
    'allocation': config.allocation,
    'alpha': config.alpha,
    'length': config.recipe.length,
    'key': config.key,
  }


def _evaluate(config: Config) -> None:
  """Prints the scores of the latest checkpoint of a run, or of an export."""
  path = str(pathlib.Path(config.evaluate).expanduser())
  distributed.check_agreement(path, 'evaluate')
  is_export = path.endswith('.npz')
  if is_export:
    exported = export.read(path)
    about = exported.about
    if not isinstance(about, dict) or not {'settings', 'step'} <= set(about):
      raise UserError(
        f'{path} is no network of {PROGRAM}: its description has no settings '
        'and step, as best.npz of a run has.'
      )
    settings, step = about['settings'], about['step']
  else:
    stored = run_folder.read_config(path)
    if stored['program'] != PROGRAM:
      raise UserError(
        f'{path} holds a run of {stored["program"]}, not of {PROGRAM}.'
      )
    settings = stored['config']
  config = from_identity(settings, config)
  run = image_run.assemble(config)
  evaluation = image_run.Evaluation(run)
  if is_export:
    scores = evaluation.of_export(exported)
  else:
    with checkpoint.Checkpoints(f'{path}/checkpoints') as saved:
      restored = saved.restore_latest(run.template())
    if restored is None:
      raise UserError(
        f'{path} has no checkpoint yet. Continue its run with --resume.'
      )
    step, scores = restored.step, evaluation.final(restored.state)
  if not jax.process_index():
    print(title(config))
    print(tables.text_table([{'step': step, **scores}]))


if __name__ == '__main__':
  sys.exit(
    arguments.run(
      main,
      PRESETS,
      prog=f'python -m experiments.{PROGRAM}',
      description=f'{str(__doc__).splitlines()[0]} {_PRESET_NAMES}',
      static_alpha=True,
    )
  )
