"""What can be said of an adapter's files without loading torch: whether it can be merged into a base model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.protocol.adapter_record import CONFIG_NAME, WEIGHTS_NAME, AdapterRecord, load_record
from dlora.protocol.errors import CheckpointError

_MAX_CONFIG_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's directory, checked.

    Attributes:
        weights_sha256: of its weights; record: None where dlora did not save it.
    """

    directory: Path
    weights_sha256: str
    record: AdapterRecord | None


def check_mergeable(directory: Path) -> AdapterFiles:
    """Raise ``CheckpointError`` for what is no LoRA of PEFT's, is damaged, or cannot be merged."""
    config = _read_config(directory)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory} is a PEFT adapter of type {config.get('peft_type')}; only LORA is merged")
    if config.get("alora_invocation_tokens"):
        raise CheckpointError(
            f"{directory} is an activated LoRA, which acts on answers only and cannot be part of the weights; train "
            "with --adapt all for an adapter that can be merged"
        )
    weights = directory / WEIGHTS_NAME
    if not weights.is_file():
        raise CheckpointError(f"{directory} has no {WEIGHTS_NAME}; weights in other files are never loaded")
    try:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{weights} cannot be read ({error.strerror})") from None
    record = load_record(directory)
    if record is not None:
        record.check_weights(directory, digest)
    return AdapterFiles(directory, digest, record)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        reason = f"it has no {CONFIG_NAME}" if directory.is_dir() else "there is no such directory"
        raise CheckpointError(f"{directory} is not a PEFT adapter: {reason}")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is too large to be a configuration")
        return msgspec.json.decode(content, type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
