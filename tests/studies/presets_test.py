"""Presets are what their record says, and so can be resumed."""

import json

import programs
import pytest

from powerprop_jax.files import json_files

PROGRAMS = ('class_specialisation', 'continual_permuted', 'dct_plus_sparse')


@pytest.mark.parametrize('name', [*PROGRAMS, 'sparse_training'])
def test_presets_survive_their_record(name):
  for config in programs.module(name).PRESETS.values():
    stored = json.loads(json.dumps(json_files.to_json(config)))
    assert json_files.from_json(type(config), stored) == config
