"""Sphinx configuration."""

import flatopt

project = "flatopt"
author = copyright = "The flatopt authors"
version = release = flatopt.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
html_theme = "sphinx_book_theme"
html_title = "flatopt"
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
nitpicky = False
