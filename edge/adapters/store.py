"""A directory of adapters by name: each is a subdirectory, that of a run or a copy of one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

import platformdirs

from dlora.protocol.errors import CheckpointError, UsageError

ADAPTERS_VARIABLE: Final = "DLORA_ADAPTERS"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


def default_directory() -> Path:
    """``$DLORA_ADAPTERS``, else a directory of this user's."""
    named = os.environ.get(ADAPTERS_VARIABLE)
    return Path(named) if named else platformdirs.user_data_path("dlora") / "adapters"


def is_name(name: str) -> bool:
    """Whether an adapter may be called so: it can name nothing but one subdirectory."""
    return _NAME.fullmatch(name) is not None


class AdapterStore:
    """The adapters in a directory, which need not exist."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def entries(self) -> list[str]:
        """All that might be meant as an adapter, sorted; ``path`` says of each whether it can be used."""
        try:
            found = [each.name for each in self.directory.iterdir() if each.is_symlink() or each.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"{self.directory} is no directory of adapters ({error.strerror})") from None
        return sorted(name for name in found if not name.startswith("."))

    def names(self) -> list[str]:
        """The names of the adapters, sorted; one of them may still be damaged. Raises ``UsageError``."""
        return [name for name in self.entries() if is_name(name) and not (self.directory / name).is_symlink()]

    def path(self, name: str) -> Path:
        """An adapter's directory. Raises ``UsageError`` where there is none of that name, or it is no name, and
        ``CheckpointError`` for a link."""
        if not is_name(name):
            raise UsageError(
                f"{name[:80]!r} cannot be the name of an adapter: at most 64 letters, digits, '.', '_' and '-', of "
                "which '.' and '-' do not come first"
            )
        path = self.directory / name
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; remove it, and copy the adapter that it points to")
        if not path.is_dir():
            raise UsageError(f"there is no adapter {name} in {self.directory}; see dlora-edge adapters list")
        return path
