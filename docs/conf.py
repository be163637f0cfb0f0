"""How Sphinx builds the site; CONTRIBUTING.md has the command."""

import pathlib
import sys

_HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(_HERE / '_ext'), str(_HERE.parent)]

import names  # noqa: E402

import powerprop_jax  # noqa: E402

project = 'powerprop_jax'
copyright = 'the authors of powerprop_jax'
release = version = powerprop_jax.__version__
html_title = f'powerprop_jax {release}'

extensions = [
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.napoleon',
  'myst_nb',  # Markdown, and notebooks that run
  'sphinx_copybutton',
  'formulas',  # from here on in _ext
  'docstrings',
  'names',
]
templates_path = ['_templates']
exclude_patterns = ['_build', 'recipes']
html_theme = 'furo'
html_favicon = '_static/mark.svg'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_use_index = html_domain_indices = False  # docs/api is the index
html_show_sphinx = False
copybutton_exclude = '.linenos, .gp, .go'  # prompts and what is printed
highlight_language = 'text'  # commands, if nothing else is said
pygments_style, pygments_dark_style = 'friendly', 'monokai'

myst_enable_extensions = ['dollarmath', 'deflist']
myst_heading_anchors = 4  # as code hosts make them
# Every notebook runs at every build, and one that fails ends it.
nb_execution_mode = 'force'
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = 'bysource'
napoleon_attr_annotations = False
autosummary_context = {'rooms': names.rooms()}
default_role = 'literal'  # `names` are code in docstrings, as in Markdown
maximum_signature_line_length = 68
napoleon_custom_sections = ['Source']
napoleon_use_rtype = False
nitpicky = True
