"""What can be said of an adapter's files without loading torch: whether it can be merged into a base model."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from dlora.protocol.adapter_record import CONFIG_NAME, WEIGHTS_NAME, AdapterRecord, load_record
from dlora.protocol.errors import CheckpointError
from dlora.protocol.module_patterns import Patterns, read_patterns
from dlora.protocol.structure_words import structure_words

_MAX_CONFIG_BYTES: Final = 16 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's directory, checked.

    Attributes:
        weights_sha256: of its weights; record: None where dlora did not save it.
        ranks, alphas: the patterns of its configuration.
    """

    directory: Path
    weights_sha256: str
    record: AdapterRecord | None
    ranks: Patterns
    alphas: Patterns


def check_mergeable(directory: Path) -> AdapterFiles:
    """Raise ``CheckpointError`` for what is no LoRA of PEFT's, is damaged, or cannot be merged, and for patterns that
    could keep PEFT busy for ever."""
    config = _read_config(directory)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory} is a PEFT adapter of type {config.get('peft_type')}; only LORA is merged")
    if config.get("alora_invocation_tokens"):
        raise CheckpointError(
            f"{directory} is an activated LoRA, which acts on answers only and cannot be part of the weights; train "
            "with --active-from start for an adapter that can be merged"
        )
    ranks, alphas = (read_patterns(directory, config, key) for key in ("rank_pattern", "alpha_pattern"))
    names = config.get("modules_to_save") or []  # PEFT has ``re`` look for them: they must be names
    if not isinstance(names, list) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise CheckpointError(f"{directory}: modules_to_save in {CONFIG_NAME} has patterns; name the modules instead")
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
    return AdapterFiles(directory, digest, record, ranks, alphas)


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
        raise CheckpointError(f"{path} cannot be read ({structure_words(error)})") from None
