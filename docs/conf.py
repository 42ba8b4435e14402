"""The documentation site: `make docs`."""

from importlib.metadata import version as _version

project = "groupwise"
author = "the groupwise authors"
release = version = _version("groupwise")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "groupwise"
exclude_patterns = ["_build"]
html_extra_path = ["explorer.html"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository that are no pages of the site
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"show-inheritance": False}
napoleon_use_rtype = False
