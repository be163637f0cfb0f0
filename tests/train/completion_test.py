"""Shells complete commands, options and values, without starting Python."""

import re
import shlex
import shutil
import subprocess

import programs
import pytest

from powerprop_jax import nets
from powerprop_jax.train import methods
from powerprop_jax.train.cli import completion
from powerprop_jax.train.cli import main as cli


@pytest.fixture
def script(tmp_path, capsys):
  """Writes the script of a shell and gives its path."""

  def write(shell):
    if shutil.which(shell) is None:
      pytest.skip(f'needs {shell}')
    assert programs.powerprop('completion', shell) == 0
    path = tmp_path / f'completion.{shell}'
    path.write_text(capsys.readouterr().out)
    subprocess.run([shell, '-n', path], check=True)
    return path

  return write


def in_bash(path, words):
  # What bash does for complete -F, with its default of files.
  program = f"""
    source {path}
    COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}
    _powerprop; printf '%s\\n' "${{COMPREPLY[@]}}"
  """
  return ['bash', '--norc', '-c', program]


def in_zsh(path, words):
  program = f"""
    compdef() {{ : }}
    compadd() {{ shift; printf '%s\\n' ${{(M)@:#$words[CURRENT]*}} }}
    source {path}
    words=({shlex.join(words)}) CURRENT={len(words)}
    _powerprop
  """
  return ['zsh', '-f', '-c', program]


def in_fish(path, words):
  line = ' '.join(words)
  return ['fish', '-N', '-c', f'source {path}; complete -C {line!r}']


RUN = {'bash': in_bash, 'zsh': in_zsh, 'fish': in_fish}


@pytest.mark.parametrize('shell', RUN)
def test_shells_complete_commands_options_and_values(shell, script, tmp_path):
  path = script(shell)

  def completed(line):
    command = RUN[shell](path, line.split(' '))
    done = subprocess.run(
      command, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert not done.stderr
    # fish shows what it is about after a tab.
    return {text.split('\t')[0] for text in done.stdout.split('\n') if text}

  assert completed('powerprop tr') == {'train'}
  assert {'train', 'data', 'nets'} < completed('powerprop ')
  assert completed('powerprop train --method r') == {'rigl'}
  assert completed('powerprop train --net ') == set(nets.NAMES)
  assert completed('powerprop train --spar') > {'--sparsity', '--sparse.period'}
  assert completed('powerprop train --conf') == {'--config'}
  assert completed('powerprop report --figures p') == {'page'}
  assert completed('powerprop prune run --sc') == {'--scope'}
  assert completed('powerprop data get fa') == {'fashion_mnist'}
  assert completed('powerprop completion z') == {'zsh'}


def test_bash_completes_after_an_equals_sign(script):
  # Bash makes a word of it.
  words = ['powerprop', 'train', '--method', '=', 'to']
  command = in_bash(script('bash'), words)
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout == 'top_kast\n'


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_options_are_those_that_the_help_explains(name, capsys):
  with pytest.raises(SystemExit):
    cli.main([name, '--help'])
  shown = capsys.readouterr().out
  # A line of options may have the same with 'no' in it.
  lines = re.findall(
    r'^[│| ]+(--[a-z][\w.-]+)(?:, (--[\w.-]+))?', shown, re.MULTILINE
  )
  expected = {option for line in lines for option in line if option}
  found = completion.options_of(type(cli.COMMANDS[name].defaults))
  assert set(found) == expected


def test_values_are_those_of_the_settings():
  found = completion.options_of(type(cli.COMMANDS['train'].defaults))
  assert found['--method'] == methods.METHODS
  assert found['--optimizer.no-nesterov'] is None
  assert found['--sparse.distribution'][0] == 'uniform'
