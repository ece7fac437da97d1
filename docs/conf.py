"""Sphinx settings: python -m sphinx -W --keep-going -b html docs build/docs.

Sphinx, and not MkDocs, because the docstrings are written with its roles (``:class:``, ``:math:``, ``.. math::``),
as torch's are; mkdocstrings would print them as they stand. The pages are Markdown (MyST). The package is read from
this checkout and needs no compiler.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
os.environ["EXCESSMTL_DISABLE_OPS"] = "1"  # docstrings are all that is read
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

project = "excessmtl_ext"
author = "the authors of excessmtl_ext"
copyright = author
try:
    release = metadata.version("excessmtl-ext")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    release = ""
version = ".".join(release.split(".")[:3])  # without the commits since the tag

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "mathml",
    "repository_links",
    "narrow_tables",
]

# ---- pages

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
pygments_style = "friendly"
pygments_dark_style = "native"

# ---- docstrings

napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 80
autodoc_mock_imports = [  # optional: a page about them must not depend on what is installed
    "LibMTL",
    "accelerate",
    "lightning",
    "matplotlib",
    "rich",
    "scipy",
    "sklearn",
    "torchjd",
    "torchvision",
    "transformers",
]

# ---- the site

html_theme = "furo"
html_title = f"excessmtl_ext {version}".strip()
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"footer_icons": [], "top_of_page_buttons": []}


def _as_written(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keeps the docstrings of attributes as they are written, if they are.

    Napoleon reads "S: the sum" as a type and its description: an empty comment in front keeps it from that. A field
    of a named tuple without a docstring has one all the same.
    """
    if what in ("attribute", "data", "property") and lines:
        lines[:] = [] if lines[0].startswith("Alias for field number") else ["..", "", *lines]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _as_written, priority=400)  # napoleon has 500
