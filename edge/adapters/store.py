"""A directory of adapters by name: each a subdirectory of its own, which appears and goes whole.

Whoever changes the directory has their turn (``files.turn_in``), so that the next one can clear up what a killed
process left.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import platformdirs

from dlora.edge.files import make_directory, storage_errors, turn_in
from dlora.protocol.errors import CheckpointError, StorageError, UsageError
from dlora.protocol.files import sync
from dlora.protocol.manifest import Manifest

from .about import OWN_FILES, PEFT_FILES, AdapterAbout, about_adapter, about_loaded
from .compatibility import check_fit
from .model_card import CARD_NAME, model_card
from .peft import LoadedAdapter, load_adapter

ADAPTERS_VARIABLE: Final = "DLORA_ADAPTERS"
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
# What is on its way in, was replaced, or is on its way out.
_SCRAP: Final = re.compile(rf"\.({_NAME.pattern})\.(partial|replaced|removed)")


def default_directory() -> Path:
    """``$DLORA_ADAPTERS``, else a directory of this user's."""
    named = os.environ.get(ADAPTERS_VARIABLE)
    return Path(named) if named else platformdirs.user_data_path("dlora") / "adapters"


def is_name(name: str) -> bool:
    """Whether an adapter may be called so: it can name nothing but one subdirectory."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Raise ``UsageError`` unless an adapter may be called so."""
    if not is_name(name):
        raise UsageError(
            f"{name[:80]!r} cannot be the name of an adapter: at most 64 letters, digits, '.', '_' and '-', of which "
            "'.' and '-' do not come first"
        )


class AdapterStore:
    """The adapters in a directory, which need not exist before the first one is added."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def entries(self) -> list[str]:
        """All that might be meant as an adapter, sorted; ``path`` says of each whether it can be used."""
        found = self._directories()
        if any(map(_SCRAP.fullmatch, found)):
            self._recover()
            found = self._directories()
        return sorted(name for name in found if not name.startswith("."))

    def names(self) -> list[str]:
        """The names of the adapters, sorted; one of them may still be damaged. Raises ``UsageError``."""
        return [name for name in self.entries() if is_name(name) and not (self.directory / name).is_symlink()]

    def path(self, name: str) -> Path:
        """An adapter's directory. Raises ``UsageError`` where there is none of that name, or it is no name."""
        check_name(name)
        path = self.directory / name
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link; remove it, and import the adapter that it points to")
        if not path.is_dir() and name not in self.entries():
            raise UsageError(f"there is no adapter {name} in {self.directory}; see dlora-edge adapters list")
        return path

    def load(self, name: str) -> LoadedAdapter:
        """Read an adapter, whole: not half of it and half of one that replaces it. Raises as ``load_adapter`` does."""
        path = self.path(name)
        with turn_in(self.directory):
            return load_adapter(path)

    def show(self, name: str) -> AdapterAbout:
        """What an adapter is. Raises ``CheckpointError`` where it cannot be used."""
        return about_adapter(self.path(name), name)

    def add(
        self, source: Path, name: str, *, manifest: Manifest | None = None, force: bool = False
    ) -> AdapterAbout:
        """Copy the adapter in the directory ``source``: PEFT's two files, the card and what dlora writes beside them.

        It is read whole first. Whenever this ends, there is all of it or nothing.

        Args:
            manifest: of a bundle that it must fit.
            force: whether one of that name is replaced.

        Raises ``UsageError`` for a name that is taken or is none, ``CheckpointError`` for what is no adapter,
        ``ModelMismatchError`` for one of another base model than the bundle's, ``StorageError``.
        """
        check_name(name)
        self._check_free(name, force=force)
        loaded = load_adapter(source)
        if manifest is not None:
            check_fit(manifest, loaded)
        make_directory(self.directory)
        place, partial = self.directory / name, self.directory / f".{name}.partial"
        with storage_errors(place), turn_in(self.directory):
            self._clear_up()
            self._check_free(name, force=force)
            try:
                _copy(source, partial, (*PEFT_FILES, *OWN_FILES))
                if load_adapter(partial).weights_sha256 != loaded.weights_sha256:
                    raise CheckpointError(f"{source} was changed while it was copied; copy it again")
                replaced = self.directory / f".{name}.replaced"
                if os.path.lexists(place):
                    place.rename(replaced)
                partial.rename(place)
                _discard(replaced)
            finally:
                self._clear_up()
            sync(self.directory)
        return about_loaded(loaded, place, name)

    def export(self, name: str, out: Path, *, with_parts: bool = False) -> None:
        """Write an adapter as a directory for PEFT, ``out``: new or empty; whole or not at all.

        ``with_parts``: with what another run can go on from, and the record of what it is. Raises ``UsageError`` where
        there is something, ``CheckpointError`` for an adapter that is damaged, ``StorageError``.
        """
        path = self.path(name)
        if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
            raise UsageError(f"{out} is there already; choose another path")
        out = out.absolute()
        partial = out.parent / f".{out.name}.partial-{os.getpid()}"
        make_directory(out.parent)
        with storage_errors(out):
            with turn_in(self.directory):
                loaded = load_adapter(path)
                try:
                    _copy(path, partial, (*PEFT_FILES, *(OWN_FILES if with_parts else ())))
                    if not (partial / CARD_NAME).exists():
                        _write_card(partial, loaded)
                    partial.rename(out)
                finally:
                    _discard(partial)
            sync(out.parent)

    def remove(self, name: str) -> None:
        """Remove an adapter, also a damaged one; of a symbolic link only the link. Raises ``UsageError`` where there is
        none of that name, ``StorageError``."""
        check_name(name)
        place = self.directory / name
        if not os.path.lexists(place):
            self.path(name)  # says so
        with storage_errors(place), turn_in(self.directory):
            self._clear_up()
            place.rename(self.directory / f".{name}.removed")
            self._clear_up()
            sync(self.directory)

    def _directories(self) -> list[str]:
        try:
            return [each.name for each in self.directory.iterdir() if each.is_symlink() or each.is_dir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UsageError(f"{self.directory} is no directory of adapters ({error.strerror})") from None

    def _recover(self) -> None:
        """Clear up where somebody was killed, and not where they are still at it; who may only read leaves it."""
        with suppress(OSError), turn_in(self.directory):
            self._clear_up()

    def _check_free(self, name: str, *, force: bool) -> None:
        if not force and os.path.lexists(self.directory / name):
            raise UsageError(f"{self.directory} has an adapter {name} already; give --force, or another --name")

    def _clear_up(self) -> None:
        """Take away what a process that was killed has left, in its turn; what it had not replaced yet comes back."""
        for path in list(self.directory.iterdir()):
            found = _SCRAP.fullmatch(path.name)
            if found is None:
                continue
            place = self.directory / found[1]
            if found[2] == "replaced" and not os.path.lexists(place):
                path.rename(place)
            else:
                _discard(path)


def _copy(source: Path, directory: Path, names: Iterable[str]) -> None:
    """Copy the files of these names that there are into a new directory, durably. Raises ``StorageError``."""
    directory.mkdir()
    for name in names:
        if (source / name).is_file():
            try:
                shutil.copyfile(source / name, directory / name)
            except shutil.Error as error:
                raise StorageError(f"cannot copy {source / name}: {error}") from None
            sync(directory / name)
    sync(directory)


def _write_card(directory: Path, loaded: LoadedAdapter) -> None:
    text = model_card(
        len(loaded.modules),
        loaded.r,
        loaded.lora_alpha,
        loaded.base_model_name or "unknown",
        acts_on_answers=bool(loaded.invocation),
        record=loaded.record,
    )
    (directory / CARD_NAME).write_text(text, encoding="utf-8")
    sync(directory / CARD_NAME)


def _discard(path: Path) -> None:
    """Remove whatever is there, and follow no link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
