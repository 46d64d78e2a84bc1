"""Settings of the documentation: `make docs`, or `sphinx-build -W --keep-going docs docs/_build/html`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_extensions"), str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("SYMGEO_EXAMPLE_SIZE", "small")

import gallery  # noqa: E402
import pictures  # noqa: E402

import symgeo  # noqa: E402

project, author = "symgeo", "The symgeo authors"
release = version = symgeo.__version__
copyright = author
extensions = ["sphinx.ext.autodoc", "myst_parser", "sphinx_gallery.gen_gallery", "docstrings", "mathml", "commands"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "_gallery", "gallery/*.ipynb", "gallery/*.py", "gallery/*.zip"]
suppress_warnings = ["config.cache"]  # the gallery's settings hold functions

myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "attrs_block"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in ("Params", "Loss", "Tensor", "Named", "Factors", "Curve")}
autodoc_inherit_docstrings = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "symgeo"
html_static_path = ["_static"]
html_css_files = ["symgeo.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": False}
pygments_style, pygments_dark_style = "friendly", "monokai"
html_math_renderer = "mathml"

pictures.draw_all(HERE / "_pictures")
sphinx_gallery_conf = gallery.settings(HERE.parent / "examples", HERE / "_gallery")
