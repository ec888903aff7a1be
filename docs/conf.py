"""Sphinx configuration."""

import importlib.util
import pathlib
import re

# Not imported: processes that read pages side by side are forked from this one.
package = pathlib.Path(__file__).parent.parent / "flatopt" / "__init__.py"

project = "flatopt"
author = copyright = "The flatopt authors"
version = release = re.search(r'__version__ = "(.+)"', package.read_text())[1]
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
# One file of this package, not its extension: that one cannot read pages side by side.
mathjax = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations[
    0
]
html_static_path = ["_static", f"{mathjax}/static/mathjax/tex-svg-full.js"]
html_css_files = ["flatopt.css"]
mathjax_path = "tex-svg-full.js"
html_theme = "sphinx_book_theme"
html_title = "flatopt"
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars, where a page is built slowly
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
nitpicky = False
