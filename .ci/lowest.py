"""Prints the lowest version that pyproject.toml admits of all that the named extras need, as pip takes it."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
lowest: dict[str, Version] = {}
for text in [*project["dependencies"], *(each for extra in sys.argv[1:] for each in extras[extra])]:
    requirement = Requirement(text)
    (version,) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
    lowest[requirement.name] = max(version, lowest.get(requirement.name, version))
lowest.pop("torch", None)  # an old one has no build for each machine, and takes gigabytes
print(*(f"{name}=={version}" for name, version in lowest.items()))
