"""The site of the documentation, by Sphinx: ``make docs``.

Pages are read from the root of the repository, so that links lead where they lead in the files.
"""

project = "dlora"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "docs/**", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.md", "SECURITY.md",
    "tests/attacks/README.md",
]  # fmt: skip
exclude_patterns = [".*", "build"]
myst_heading_anchors = 4
# Decisions are listed on their own page; mermaid is drawn by who reads the files on a forge.
suppress_warnings = ["toc.not_included", "misc.highlighting_failure"]
html_theme = "furo"
html_title = "dlora"
html_show_copyright = False
