"""What an adapter was trained as, beside the LoRA that it amounts to: so that another run can go on from it.

PEFT's files have ``lora_A`` and ``lora_B`` of every module. Of the kinds whose server keeps a part, that is not enough:
a server would have to be sent what was never sent. ``adapter_parts.safetensors`` has what the device trained and a copy
of what the server kept, apart; PEFT does not look at it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import safetensors

from dlora.edge.engine.engine import Array
from dlora.edge.files import storage_errors, write_atomically
from dlora.edge.tensor_file import safetensors_chunks
from dlora.protocol.adapters import KINDS
from dlora.protocol.errors import CheckpointError
from dlora.protocol.groups import Gain
from dlora.protocol.limits import MAX_RANK

PARTS_NAME: Final = "adapter_parts.safetensors"


@dataclass(frozen=True)
class Parts:
    """An adapter as it was trained.

    Attributes:
        kind, r, scaling: of all its groups.
        gains: of its target modules, by name; 1 where there is none.
        tensors: the trained matrices, float32, and what the server kept, as it crosses, by the names of
            ``GroupAdapters.parts``.
    """

    kind: str
    r: int
    scaling: float
    gains: Mapping[str, float]
    tensors: Mapping[str, Array]


def save_parts(directory: Path, parts: Parts | None, weights_sha256: str) -> None:
    """Write the parts of an adapter whose PEFT weights have that digest; None: it has none.

    Raises ``StorageError``.
    """
    path = directory / PARTS_NAME
    if parts is None:
        with storage_errors(path):
            path.unlink(missing_ok=True)
        return
    about = {
        "kind": parts.kind,
        "r": str(parts.r),
        "scaling": repr(parts.scaling),
        "gains": msgspec.json.encode(parts.gains).decode(),
        "weights": weights_sha256,
    }
    write_atomically(path, safetensors_chunks(parts.tensors, about))


def load_parts(directory: Path, weights_sha256: str) -> Parts | None:
    """The parts of the adapter whose PEFT weights have that digest.

    None where there are none, or where they are those of other weights: of an adapter that was changed since, or whose
    saving was cut short between the two files. It is an ordinary LoRA then. Raises ``CheckpointError`` for a file that
    is damaged.
    """
    path = directory / PARTS_NAME
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "np") as file:
            about = file.metadata() or {}
            if about.get("weights") != weights_sha256:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        gains = msgspec.json.decode(about.get("gains", "{}"), type=dict[str, Gain])
        parts = Parts(KINDS[about["kind"]].name, int(about["r"]), float(about["scaling"]), gains, tensors)
        if not (1 <= parts.r <= MAX_RANK and 0 < parts.scaling < math.inf):
            raise ValueError("a rank or a scaling that cannot be")
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it, and the adapter is an ordinary LoRA") from None
    if not all(np.isfinite(tensor).all() for tensor in tensors.values()):
        raise CheckpointError(f"{path} has values that are not finite; delete it, and it is an ordinary LoRA")
    return parts
