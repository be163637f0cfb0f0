"""The recipes of the documentation run, are short, and do what they say."""

import pathlib
import runpy

import jax
import pytest

_RECIPES = sorted(pathlib.Path(__file__).parents[1].glob('docs/recipes/*.py'))


@pytest.mark.parametrize('path', _RECIPES, ids=lambda path: path.stem)
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.slow
def test_recipe(path, capsys):
  assert len(path.read_text(encoding='utf-8').splitlines()) <= 60
  with jax.numpy_rank_promotion('allow'):
    found = runpy.run_path(str(path))
  first, again = capsys.readouterr().out.splitlines()
  accuracy = float(first.split()[1])
  assert accuracy == float(again.split()[1]) > 0.85
  masks = [m for m in jax.tree.leaves(found['masks']) if m.ndim > 1]
  assert sum(m.sum() for m in masks) == sum(m.size for m in masks) // 10
