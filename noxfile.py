"""What holds before a release, each in an environment of its own.

    nox                    all of it
    nox -s smoke-3.12      wheel and sdist, installed as users do
    nox -s lowest          tests with the lowest versions of pyproject.toml
    nox -s newest          tests with the newest that there are

nox looks for python3.11, python3.12, … on the PATH; pyenv puts all of them
there with `pyenv shell 3.11.7 3.12.1 3.13.0`.
"""

import pathlib

import nox

PYTHONS = ('3.11', '3.12', '3.13')
# The quick tests of the library. Others: nox -s lowest -- -m slow tests/sparse
TESTS = ('-n', '2', '--ignore=tests/studies', '--ignore=tests/docs', 'tests')
_ROOT = pathlib.Path(__file__).parent
_PROJECT = nox.project.load_toml('pyproject.toml')['project']

nox.options.default_venv_backend = 'venv'


def _smoke(session):
  """Runs tests/smoke.py away from the repository, which must not be found."""
  session.chdir(session.create_tmp())
  session.run('python', _ROOT / 'tests' / 'smoke.py')
  session.chdir(_ROOT)


@nox.session(python=PYTHONS)
def smoke(session):
  """The wheel alone and with its programs, then the sdist."""
  folder = pathlib.Path(session.create_tmp(), 'dist')
  session.install('build')
  session.run('python', '-m', 'build', '--outdir', folder, silent=True)
  (wheel,), (sdist,) = folder.glob('*.whl'), folder.glob('*.tar.gz')
  session.install(wheel)
  _smoke(session)
  session.install(f'{wheel}[train]')
  _smoke(session)
  session.install('--force-reinstall', '--no-deps', sdist)
  _smoke(session)


@nox.session(python=PYTHONS[0])
def lowest(session):
  """The quick tests, with the lowest versions that may be installed."""
  pins = [line.replace('>=', '==') for line in _PROJECT['dependencies']]
  session.install('-e', '.[train,test]', *pins)
  _smoke(session)
  session.run('python', '-m', 'pytest', *(session.posargs or TESTS))


@nox.session(python=PYTHONS[-1])
def newest(session):
  """The same, with the newest."""
  session.install('-e', '.[train,test]')
  _smoke(session)
  session.run('python', '-m', 'pytest', *(session.posargs or TESTS))
