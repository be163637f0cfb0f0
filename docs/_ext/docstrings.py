"""Docstrings and signatures as they are written.

Docstrings are plain text with `code`, doctests and sections such as `Args:`;
what follows an empty line and is indented by four spaces more is shown as it
stands. Signatures have the names of types that the source has.
"""

import ast
import inspect
import pathlib
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

import powerprop_jax as pp

_CODE = re.compile(r'(`+.*?`+)')
_NAME = re.compile(r'(?<![\w.`])pp(?:\.\w+)+(?!`)')


def _escaped(line: str) -> str:
  """A line in which |φ| and a * b mean nothing, and pp.name is code."""
  parts = _CODE.split(_NAME.sub(r'`\g<0>`', line))
  parts[::2] = [re.sub(r'([*|]|_\b)', r'\\\1', part) for part in parts[::2]]
  return ''.join(parts)


def _comment(name: str) -> list[str]:
  """The comment above what is defined by an assignment, such as a type."""
  last = name.rpartition('.')[2]
  above = re.compile(rf'((?:^# .*\n)+){last}\b.* = ', re.MULTILINE)
  for path in sorted(pathlib.Path(pp.__file__).parent.rglob('*.py')):
    if found := above.search(path.read_text(encoding='utf-8')):
      return [line[2:] for line in found[1].splitlines()]
  return []


def _docstring(
  app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
  """Escapes text, and marks blocks that are indented as literal."""
  del app, thing, options
  old, lines[:] = _comment(name) if what == 'data' else list(lines), []
  base, literal = 0, False
  for number, line in enumerate(old):
    indent = len(line) - len(line.lstrip())
    starts = bool(line) and (number == 0 or not old[number - 1])
    if literal and line and indent < base + 4:
      literal = False
    if starts and not literal:
      if indent >= base + 4:
        literal = True
        lines.extend([' ' * base + '.. code-block:: default', ''])
      else:
        base = indent
    is_code = literal or line.lstrip().startswith(('>>>', '...'))
    lines.append(line if is_code else _escaped(line))


class _Classes(ast.NodeTransformer):
  """Says of which module a class is; shown is its name alone."""

  def __init__(self, scope: dict[str, Any]):
    self._scope = scope

  def visit_Name(self, node: ast.Name) -> ast.expr:
    thing = self._scope.get(node.id)
    if not inspect.isclass(thing) or thing.__module__ == 'collections.abc':
      return node
    full = ast.parse(f'{thing.__module__}.{thing.__qualname__}', mode='eval')
    return ast.UnaryOp(ast.Invert(), full.body)


def _signature(
  app: Sphinx,
  what: str,
  name: str,
  thing: Any,
  options: Any,
  signature: str | None,
  returns: str | None,
) -> tuple[str | None, str | None]:
  del app, name, options
  if what == 'class':
    if issubclass(thing, tuple):  # its attributes say it
      return '', None
    thing = vars(thing).get('__init__')
  try:
    thing = inspect.unwrap(thing)
    assert not hasattr(thing, '__signature__')  # written nowhere
    source = textwrap.dedent(inspect.getsource(thing))
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    _Classes(thing.__globals__).visit(function)
  except (OSError, TypeError, AssertionError, SyntaxError):
    return signature, returns
  if what in ('class', 'method'):
    del (function.args.posonlyargs or function.args.args)[0]
  returns = ast.unparse(function.returns) if function.returns else None
  shown = f'({ast.unparse(function.args)})'
  return shown, None if what == 'class' else returns


def setup(app: Sphinx) -> dict[str, Any]:
  """Connects both, before the sections of a docstring are found."""
  app.connect('autodoc-process-docstring', _docstring, priority=100)
  app.connect('autodoc-process-signature', _signature)
  return {'parallel_read_safe': True, 'parallel_write_safe': True}
