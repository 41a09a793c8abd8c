"""Settings of the site; ``make docs`` builds it."""

from typing import Any

import granet_jax

project = "granet_jax"
author = "the authors of granet_jax"
version = release = granet_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

highlight_language = "none"  # of blocks that name no language

html_theme = "furo"
html_title = "granet_jax"
html_show_copyright = False
html_theme_options = {"source_repository": "", "navigation_with_keys": True}

# Cells are run when a page has changed; an error or a warning of one stops the build.
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

suppress_warnings = ["mystnb.unknown_mime_type"]


def _examples_apart(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Examples follow their words without an empty line, which reStructuredText wants."""
    for i in reversed(range(1, len(lines))):
        starts = lines[i].lstrip().startswith(">>>")
        if starts and lines[i - 1].strip() and not lines[i - 1].lstrip().startswith((">>>", "...")):
            lines.insert(i, "")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _examples_apart)
