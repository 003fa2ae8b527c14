"""``dlora_adapter.json`` beside PEFT's files: what a saved adapter is of, so that a copy of its directory says it too.

The device writes it and reads it; the exporter reads it where it merges an adapter. PEFT does not look at it. An
adapter without one, of PEFT itself for instance, is as good: it only says nothing of its base model's weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec

from .choices import WeightFormat
from .errors import CheckpointError
from .structure_words import structure_words
from .version import ADAPTER_FORMAT

RECORD_NAME: Final = "dlora_adapter.json"
CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
_MAX_BYTES: Final = 1 << 20

Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
Setting = str | int | float | bool | None


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an adapter learnt, and what that took. Never a seed, a path, a server's name or a digest of the data.

    Attributes:
        steps: of the optimizer; examples: of the training data; tokens, labelled: that all steps have seen.
        eval_loss_before, eval_loss_after: mean loss a label on held-out data of the base model and of this very
            adapter; None where it was not evaluated. eval_tokens: labels of that data.
        eval_loss_live: where it was trained in passes, and ``eval_loss_after`` is of these: used live, as PEFT does;
            is_worse_live: whether that is worse.
        bytes_per_token: both ways, of all steps; round_trips_per_step: waits for the server.
        block_dtype: how the blocks were stored that ran on the device; None: none did, or nobody knows.
        recipe: options of ``dlora-edge train`` by their names with ``_``, and what they were.
        versions: of Python and of the libraries that computed.
    """

    steps: Count
    examples: Count
    tokens: Count
    labelled: Count
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    eval_tokens: Count | None = None
    eval_loss_live: float | None = None
    is_worse_live: bool | None = None
    bytes_per_token: Amount
    round_trips_per_step: Amount
    block_dtype: str | None = None
    recipe: dict[str, Setting]
    versions: dict[str, str]


class AdapterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file; what nobody knows is None.

    Attributes:
        base_weight_format: how the server held those of the base model: what was trained is for these.
        kind: what it was trained as.
        weights_sha256: of ``adapter_model.safetensors``.
        replaces_sha256: of the weights that are being replaced: a save that was cut short may have left these.
    """

    format: int
    software: str
    base_model: str
    base_fingerprint: Digest
    kind: str
    rank: Annotated[int, msgspec.Meta(ge=1)]
    weights_sha256: Digest
    replaces_sha256: Digest | None = None
    training: TrainingRecord | None = None
    base_weight_format: WeightFormat = "full"

    def check_weights(self, directory: Path, digest: str) -> None:
        """Raise ``CheckpointError`` where ``digest`` is not that of the weights that this is written about."""
        if digest not in (self.weights_sha256, self.replaces_sha256):
            raise CheckpointError(
                f"{directory / WEIGHTS_NAME} has not the SHA-256 that {RECORD_NAME} gives: it is damaged, or was "
                f"changed since. Copy the adapter again; or, where you changed it yourself, delete its {RECORD_NAME}"
            )


class _Format(msgspec.Struct):
    format: int


def load_record(directory: Path) -> AdapterRecord | None:
    """An adapter's record; None where it has none. Raises ``CheckpointError`` for one that is damaged or too new."""
    path = directory / RECORD_NAME
    advice = "copy the adapter again, or delete this file, and it is an adapter of PEFT's"
    try:
        if not path.is_file():
            if path.exists():
                raise CheckpointError(f"{path} is no regular file; {advice}")
            return None
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise CheckpointError(f"{path} is too large to be an adapter's record; {advice}")
        found = msgspec.json.decode(content, type=_Format).format
        if found > ADAPTER_FORMAT:
            raise CheckpointError(f"{path} has format {found}, this dlora reads up to {ADAPTER_FORMAT}; update dlora")
        return msgspec.json.decode(content, type=AdapterRecord)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({structure_words(error)}); {advice}") from None


def encode_record(record: AdapterRecord) -> bytes:
    """The file's bytes."""
    return msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n"
