"""Messages that the pages show are those that the library gives."""

import doctest
import pathlib
import re
import warnings

import jax
import pytest

from powerprop_jax.train.cli import main as cli

_DOCS = pathlib.Path(__file__).parents[2] / 'docs'
_PAGES = sorted(
  page for page in _DOCS.glob('**/*.md') if '```pycon' in page.read_text()
)


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.stem)
@pytest.mark.slow
def test_a_session_on_a_page_goes_as_it_says(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # sessions may write files
  sessions = page.read_text().split('```pycon\n')[1:]
  text = '\n'.join(session.split('```')[0] for session in sessions)
  test = doctest.DocTestParser().get_doctest(text, {}, page.name, None, 0)
  runner = doctest.DocTestRunner(
    optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
  )
  with warnings.catch_warnings(), jax.numpy_rank_promotion('allow'):
    warnings.simplefilter('error', UserWarning)
    warnings.simplefilter('ignore', DeprecationWarning)
    assert runner.run(test).failed == 0
  assert test.examples


@pytest.mark.slow
def test_commands_are_refused_as_the_page_says(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  text = (_DOCS / 'guides/mistakes.md').read_text()
  blocks = re.findall('```console\n(.*?)```', text, re.DOTALL)
  shown = re.findall(r'\$ powerprop (.*)\n([^$]*)', ''.join(blocks))
  assert len(shown) == text.count('$ powerprop') > 10
  same = doctest.OutputChecker().check_output
  for command, message in shown:
    status = cli.main(command.split())
    found = capsys.readouterr().err
    assert status == 2 * bool(message), found
    if message:
      flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
      assert same(message, found, flags), found


@pytest.mark.parametrize('guide', ['alpha', 'which_method'])
def test_accuracies_of_a_guide_are_those_of_the_results(guide):
  text = (_DOCS / f'guides/{guide}.md').read_text()
  measured = '\n'.join(
    page.read_text() for page in (_DOCS / 'results').glob('*.md')
  )
  accuracies = set(re.findall(r'(?<![\d.])\d\d\.\d\d(?![\d.])', text))
  assert len(accuracies) > 10
  for accuracy in accuracies:
    share = f'{float(accuracy) / 100:.4f}'
    assert accuracy in measured or share in measured, accuracy
