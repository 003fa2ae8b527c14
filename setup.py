"""What pyproject.toml has no words for: the README as a package index shows it, where links to files lead nowhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_LINK = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")


def with_absolute_links(text: str, repository: str) -> str:
    """Markdown whose links to files of this folder lead to ``repository``'s main branch, those to pictures to the files
    themselves."""

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link[1].endswith((".png", ".svg")) else "blob"
        return f"]({repository}/{kind}/main/{link[1]})"

    return _LINK.sub(absolute, text)


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    setup(
        long_description=with_absolute_links(readme, project["urls"]["Repository"]),
        long_description_content_type="text/markdown",
    )
