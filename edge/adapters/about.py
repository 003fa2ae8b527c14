"""What a saved adapter is, in a few fields: of any directory that PEFT or a run has written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dlora.protocol.adapter_record import CONFIG_NAME, RECORD_NAME, WEIGHTS_NAME, TrainingRecord
from dlora.protocol.errors import CheckpointError
from dlora.protocol.targets import number_ranges

from .model_card import CARD_NAME
from .parts import PARTS_NAME
from .peft import LoadedAdapter, load_adapter

PEFT_FILES: Final = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
OWN_FILES: Final = (RECORD_NAME, PARTS_NAME)
"""What dlora writes beside PEFT's files."""


@dataclass(frozen=True)
class AdapterAbout:
    """One adapter.

    Attributes:
        kind: what it was trained as; ``lora`` for PEFT's own.
        rank, alpha: the configuration's; single modules may differ.
        modules: how many have an adapter; blocks: in which blocks, ``0,3,26-29``; parameters: numbers in A and B.
        acts_on: ``everything``, or ``answers`` (activated LoRA).
        base_model: its name; base_fingerprint: of its weights; base_weight_format: how a server holds these; each None
            where nobody knows.
        bytes: of its files.
        weights_sha256, config_sha256: of PEFT's two files.
        training: what it learnt and what that took; None where nobody knows.
    """

    name: str
    kind: str
    rank: int
    alpha: float
    modules: int
    blocks: str
    parameters: int
    acts_on: str
    base_model: str | None
    base_fingerprint: str | None
    base_weight_format: str | None
    bytes: int
    weights_sha256: str
    config_sha256: str
    training: TrainingRecord | None


def about_adapter(path: Path) -> AdapterAbout:
    """Read and check the adapter in the directory ``path``, whole. Raises ``CheckpointError``."""
    return about_loaded(load_adapter(path), path)


def about_loaded(loaded: LoadedAdapter, path: Path) -> AdapterAbout:
    """The same of one that was read already."""
    record = loaded.record
    try:
        files = [path / each for each in (*PEFT_FILES, *OWN_FILES) if (path / each).is_file()]
        size = sum(file.stat().st_size for file in files)
        config = hashlib.sha256((path / CONFIG_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    return AdapterAbout(
        name=path.absolute().name,
        kind=record.kind if record is not None else loaded.parts.kind if loaded.parts is not None else "lora",
        rank=loaded.r,
        alpha=loaded.lora_alpha,
        modules=len(loaded.modules),
        blocks=number_ranges({int(part) for each in loaded.modules for part in each.split(".") if part.isdecimal()}),
        parameters=sum(module.lora_A.size + module.lora_B.size for module in loaded.modules.values()),
        acts_on="answers" if loaded.invocation else "everything",
        base_model=loaded.base_model_name or (record.base_model if record is not None else None),
        base_fingerprint=record.base_fingerprint if record is not None else None,
        base_weight_format=record.base_weight_format if record is not None else None,
        bytes=size,
        weights_sha256=loaded.weights_sha256,
        config_sha256=config,
        training=record.training if record is not None else None,
    )
