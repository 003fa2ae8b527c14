"""``run.json`` in a run's directory: every setting, as given or chosen, so that the run can go on without them.

Never a token: at most the name of the file that holds it.
"""

from __future__ import annotations

import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from dlora.edge.choices import EngineChoice, Keep, ModeChoice, OnWorse, TooLong, TrainOn
from dlora.edge.data.examples import Dataset
from dlora.edge.files import write_atomically
from dlora.edge.training.schedule import ScheduleName
from dlora.protocol.choices import Adapt, Basis, KindChoice, OnKill, ScoreName, Send, UnitKind
from dlora.protocol.errors import CheckpointError, UsageError
from dlora.protocol.files import read_regular
from dlora.protocol.kill_revive import Fraction
from dlora.protocol.limits import MAX_STEPS, MAX_THREADS
from dlora.protocol.structure_words import structure_words
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

RUN_FILE = "run.json"
LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "safetensors", "websockets", "msgspec")

# As the command line has them: run.json may have been edited.
FilePath = Annotated[str, msgspec.Meta(pattern=r"\A[^\0]+\Z")]
Count = Annotated[int, msgspec.Meta(ge=1, le=MAX_STEPS)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEPS)]
Amount = Annotated[float, msgspec.Meta(ge=0)]


class RunSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of ``dlora-edge train``, under their own names; paths are absolute. See ``--help``.

    Where blocks run (``auto``), what adapters are, the learning rate and the weight decay may be left open; a run's own
    file has what was chosen.
    """

    bundle: FilePath
    server: str | None
    mode: ModeChoice
    device_blocks: Count | None
    cache_mb: Amount | None
    exact: bool
    keep_cache: bool
    cache_key_file: FilePath | None
    data: FilePath
    out: FilePath
    eval_data: FilePath | None
    epochs: Amount
    steps: Count | None
    batch_size: Count
    grad_accum: Count
    max_length: Count | None
    too_long: TooLong
    columns: str | None
    train_on: TrainOn
    split: str
    lr: Amount | None
    schedule: ScheduleName
    warmup: Amount
    weight_decay: Amount | None
    max_grad_norm: Amount
    kind: KindChoice | None
    basis: Basis | None
    basis_steps: Count | None
    rank: Count | None
    alpha: float | None
    target_modules: str | None
    blocks: str
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] | None
    init_adapter: FilePath | None
    save_every: Count
    eval_every: Whole | None
    keep: Keep
    patience: Count | None
    on_worse: OnWorse
    tensorboard: bool
    wire_dtype: str | None
    send: Send
    adapt: Adapt | None
    threads: Annotated[int, msgspec.Meta(ge=0, le=MAX_THREADS)]
    engine: EngineChoice
    token_file: FilePath | None
    ca: FilePath | None
    client_cert: FilePath | None
    client_key: FilePath | None
    insecure: bool
    max_retry_s: Amount | None
    exchange_timeout_s: Annotated[float, msgspec.Meta(ge=1)]
    pause_when: list[str] | None
    active_fraction: Fraction
    bytes_per_token: Count | None
    kr_score: ScoreName
    kr_unit: UnitKind
    kr_warmup_steps: Whole | None
    kr_ramp_fraction: Fraction | None
    kr_kill_every: Count
    kr_revive_every: Whole
    kr_revive_share: Fraction
    kr_probation: Whole
    kr_hysteresis: Fraction
    kr_on_kill: OnKill
    kr_cost_aware: bool
    kr_spread: bool
    pin: str
    static_units: str

    @classmethod
    def of(cls, options: dict[str, Any]) -> RunSettings:
        """From a command's options, some of which may be no settings of a run. Raises ``UsageError`` for infinity."""
        given = {name: options[name] for name in cls.__struct_fields__}
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):  # no JSON has it
                raise UsageError(f"--{name.replace('_', '-')} {value} is no number; write one, or leave it out")
        try:
            return msgspec.convert({name: _plain(value) for name, value in given.items()}, cls)
        except msgspec.ValidationError as error:
            raise UsageError(f"an option has a value that is not allowed: {structure_words(error)}") from None

    def path(self, name: str) -> Path | None:
        """A setting that is a path."""
        value = getattr(self, name)
        return None if value is None else Path(value)


def _plain(value: Any) -> Any:
    return str(value.absolute()) if isinstance(value, Path) else value


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
            lengths=_quartiles(dataset.lengths),
        )


class RunFile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        data, eval_data: what was read.
        base_model: name and fingerprint.
        invocation: the tokens from which on adapters act, where they act on answers.
        versions: of this software, the wire, Python and the libraries that compute.
        server: software and wire version of the server that was asked last; None where none was.
        blocks: the number of each unit in the base model, where units are blocks; None where they are groups.
    """

    settings: RunSettings
    data: DataDigest
    eval_data: DataDigest | None
    base_model: dict[str, str]
    invocation: tuple[int, ...]
    versions: dict[str, Any]
    server: dict[str, Any] | None = None
    blocks: tuple[int, ...] | None = None


def _quartiles(lengths: npt.NDArray[np.int64]) -> tuple[float, float, float, float, float]:
    least, first, middle, third, most = np.quantile(lengths, (0, 0.25, 0.5, 0.75, 1)).tolist()
    return least, first, middle, third, most


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


def save_run_file(out: Path, run: RunFile) -> None:
    """Write ``run.json``. Raises ``StorageError``."""
    write_atomically(out / RUN_FILE, msgspec.json.format(msgspec.json.encode(run), indent=1) + b"\n")


def load_run_file(out: Path) -> RunFile:
    """Read a run's ``run.json``. Raises ``CheckpointError`` where there is none, or it is damaged."""
    path = out / RUN_FILE
    try:
        return msgspec.json.decode(read_regular(path), type=RunFile)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{out} is no run: it has no {RUN_FILE}; give the --out of a run, or repeat its options with train --resume"
        ) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({structure_words(error)}); repeat the run's options with dlora-edge train --resume"
        ) from None
