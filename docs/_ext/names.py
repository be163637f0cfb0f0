"""Names of the library on the site.

Code that names something, `pp.rigl` in a docstring or on a page, links to the
page of `powerprop_jax.rigl`. The build warns of a name without a page: of one
that is written somewhere, and of one that is public.
"""

from collections.abc import Iterable
import importlib
import inspect
import pathlib
import pkgutil
import re
import types
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext import autosummary
from sphinx.transforms import post_transforms
from sphinx.util import logging
from sphinx.util import nodes as sphinx_nodes

import powerprop_jax as pp

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r'(?:pp|powerprop_jax)((?:\.\w+)+)')


def _link(app: Sphinx, docname: str, name: str, shown: nodes.Element) -> Any:
  """A link to the page of a full name, None if it has none."""
  found = app.env.domains.python_domain.objects.get(name)
  return found and sphinx_nodes.make_refnode(
    app.builder, docname, found.docname, found.node_id, shown, name
  )


class _Links(post_transforms.SphinxPostTransform):
  default_priority = 5

  def run(self, **kwargs: Any) -> None:
    del kwargs
    for code in list(self.document.findall(nodes.literal)):
      match = _NAME.match(code.astext())
      if not match or isinstance(code.parent, nodes.reference):
        continue
      name = 'powerprop_jax' + match[1]
      link = _link(self.app, self.env.docname, name, code.deepcopy())
      if link:
        code.replace_self(link)
      # Changes may be of names that have moved since.
      elif self.env.docname != 'changes' and not _is_module(name):
        _LOG.warning('%s has no page in docs/api', name, location=code)


def _is_module(name: str) -> bool:
  try:
    return inspect.ismodule(pkgutil.resolve_name(name))
  except AttributeError:
    return False


def _leave_out_of_the_sidebar(app: Sphinx, document: nodes.document) -> None:
  """Names of a room are on the page of the room; the sidebar ends there."""
  if app.env.docname.startswith('api/generated/'):
    for tree in list(document.findall(autosummary.autosummary_toc)):
      tree.parent.remove(tree)


def _type_of_a_signature(
  app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, shown: Any
) -> Any:
  """The page of a type, which a signature names as its module does.

  Types of other libraries, and names of types of arguments that have no page,
  stay text.
  """
  last = node['reftarget'].rpartition('.')[2]
  for name, found in env.domains.python_domain.objects.items():
    is_type = found.objtype in ('class', 'data', 'exception')
    if is_type and name.rpartition('.')[2] == last:
      return _link(app, node['refdoc'], name, shown)
  return shown if node['reftype'] == 'class' else None


def public_names(module: types.ModuleType) -> list[str]:
  """What users find in a module: __all__ but modules, or what it defines."""
  if hasattr(module, '__all__'):
    names = [*module.__all__]
    return [n for n in names if not inspect.ismodule(getattr(module, n))]
  return [
    name
    for name, thing in vars(module).items()
    if not name.startswith('_')
    and (inspect.isfunction(thing) or inspect.isclass(thing))
    and thing.__module__ == module.__name__
  ]


def rooms() -> dict[str, list[str]]:
  """The public names of every module, in its order."""
  found = {'powerprop_jax': list(pp.__all__)}
  for name in pp.__all__:
    thing = getattr(pp, name)
    if inspect.ismodule(thing):
      found[f'powerprop_jax.{name}'] = public_names(thing)
  for module in pkgutil.walk_packages(pp.__path__, 'powerprop_jax.'):
    if not module.name.endswith('__main__'):
      names = public_names(importlib.import_module(module.name))
      found.setdefault(module.name, names)
  return found


def _full_names(rooms: dict[str, list[str]], which: Iterable[str]) -> set[str]:
  return {f'{room}.{name}' for room in which for name in rooms[room]}


def _remove_old_pages(app: Sphinx) -> None:
  """Removes the generated pages of names that are no more."""
  rooms = app.config.autosummary_context['rooms']
  known = _full_names(rooms, rooms) | set(rooms)
  for page in pathlib.Path(app.srcdir, 'api/generated').glob('*.rst'):
    if page.stem not in known:
      page.unlink()


def _check_all_have_a_page(app: Sphinx, env: BuildEnvironment) -> None:
  rooms = app.config.autosummary_context['rooms']
  public = _full_names(rooms, ['powerprop_jax'])
  public |= _full_names(rooms, public & set(rooms))
  for name in sorted(public - set(env.domains.python_domain.objects)):
    _LOG.warning('%s is public and has no page in docs/api', name)


def setup(app: Sphinx) -> dict[str, Any]:
  """Connects the links and the check."""
  app.connect('builder-inited', _remove_old_pages, priority=100)
  app.add_post_transform(_Links)
  app.connect('doctree-read', _leave_out_of_the_sidebar, priority=100)
  app.connect('missing-reference', _type_of_a_signature)
  app.connect('env-check-consistency', _check_all_have_a_page)
  return {'parallel_read_safe': True, 'parallel_write_safe': True}
