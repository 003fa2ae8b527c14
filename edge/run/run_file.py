"""``run.json`` in a run's directory: every setting, as given or chosen, so that the run can go on without them.

Never a token: at most the name of the file that holds it.
"""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dlora.edge.data.examples import Dataset
from dlora.edge.files import write_atomically
from dlora.edge.settings import Settings, read_path
from dlora.edge.training.resolved import Resolved
from dlora.protocol.errors import CheckpointError
from dlora.protocol.files import read_regular
from dlora.protocol.manifest import Manifest
from dlora.protocol.messages import Welcome
from dlora.protocol.structure_words import structure_words
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

RUN_FILE = "run.json"
LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "safetensors", "websockets", "msgspec")


class DataDigest(msgspec.Struct, frozen=True):
    """What was made of a data file: its token ids' fingerprint and its size.

    Attributes:
        lengths: tokens of its examples: the shortest, the quartiles, the longest.
    """

    fingerprint: str
    examples: int
    tokens: int
    labelled: int
    truncated: int
    skipped: int
    lengths: tuple[float, float, float, float, float]

    @classmethod
    def of(cls, dataset: Dataset) -> DataDigest:
        return cls(
            fingerprint=dataset.fingerprint,
            examples=len(dataset),
            tokens=dataset.tokens,
            labelled=dataset.labelled,
            truncated=dataset.facts.truncated.count,
            skipped=dataset.facts.skipped.count,
            lengths=tuple(np.quantile(dataset.lengths, (0, 0.25, 0.5, 0.75, 1)).tolist()),
        )


class RunFile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        settings: with what was chosen in place of what was left open.
        data, eval_data: what was read.
        base_model: name and fingerprint.
        invocation: the tokens from which on adapters act, where they act on answers.
        versions: of this software, the wire, Python and the libraries that compute.
        server: software and wire version of the server that was asked last; None where none was.
        blocks: the number of each unit in the base model, where units are blocks; None where they are groups.
    """

    settings: Settings
    data: DataDigest
    eval_data: DataDigest | None
    base_model: dict[str, str]
    invocation: tuple[int, ...]
    versions: dict[str, Any]
    server: dict[str, Any] | None = None
    blocks: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        config: Resolved,
        manifest: Manifest,
        dataset: Dataset,
        eval_dataset: Dataset | None,
        server: Welcome | None,
    ) -> RunFile:
        """Of a run as it stands. ``server``: what it said of itself; None where none was asked yet."""
        base = manifest.base_model
        return cls(
            settings=config.as_settings(),
            data=DataDigest.of(dataset),
            eval_data=None if eval_dataset is None else DataDigest.of(eval_dataset),
            base_model={"name": base.name, "fingerprint": base.fingerprint},
            invocation=config.invocation,
            versions=versions(),
            server=None if server is None else {"software": server.software, "wire": server.protocol_version},
            blocks=block_numbers(config, manifest),
        )


def block_numbers(config: Resolved, manifest: Manifest) -> tuple[int, ...] | None:
    """The number of each unit in the base model, where units are blocks."""
    if config.units.unit != "block":
        return None
    return tuple(sorted({group.block for group in config.groups(manifest)}))


def versions() -> dict[str, Any]:
    """What this process runs with."""
    found: dict[str, Any] = {
        "dlora": SOFTWARE_VERSION,
        "wire": list(PROTOCOL_VERSIONS),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # the one-file binary carries no metadata of some
            found[name] = None
    return found


def save_run_file(out: Path, run: RunFile, *, keeps_server: bool = False) -> None:
    """Write ``run.json``. Raises ``StorageError``.

    ``keeps_server``: where no server was asked yet, what the file knew of one stays.
    """
    if run.server is None and keeps_server:
        with contextlib.suppress(CheckpointError):
            run = msgspec.structs.replace(run, server=load_run_file(out).server)
    write_atomically(out / RUN_FILE, msgspec.json.format(msgspec.json.encode(run, enc_hook=str), indent=1) + b"\n")


def load_run_file(out: Path) -> RunFile:
    """Read a run's ``run.json``. Raises ``CheckpointError`` where there is none, or it is damaged."""
    path = out / RUN_FILE
    try:
        return msgspec.json.decode(read_regular(path), type=RunFile, dec_hook=read_path)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{out} is no run: it has no {RUN_FILE}; give the --out of a run, or repeat its options with train --resume"
        ) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({structure_words(error)}); repeat the run's options with dlora-edge train --resume"
        ) from None
