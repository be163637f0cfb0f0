"""Formulas as MathML, made at build time: browsers draw it without a script."""

from typing import Any

from docutils import nodes
from latex2mathml import converter
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def _mathml(latex: str, display: str) -> str:
  formula = converter.convert(latex, display=display)
  # |φ| without the spaces of a relation.
  bar = '<mo stretchy="false"'
  return formula.replace(f'{bar}>', f'{bar} lspace="0" rspace="0">')


def _inline(self: HTML5Translator, node: nodes.math) -> None:
  self.body.append(_mathml(node.astext(), 'inline'))
  raise nodes.SkipNode


def _display(self: HTML5Translator, node: nodes.math_block) -> None:
  self.body.append(self.starttag(node, 'div', CLASS='math'))
  self.body.append(_mathml(node.astext(), 'block') + '</div>')
  raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
  """Registers the renderer, and asks Sphinx for it."""
  app.add_html_math_renderer('mathml', (_inline, None), (_display, None))
  return {'parallel_read_safe': True, 'parallel_write_safe': True}
