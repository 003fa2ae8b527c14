"""Fuzz target: a checkpoint that somebody changed. A whole checkpoint, or ``CheckpointError``."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from attacks.fuzz_target import Target, decode_json, encode_json, mutate_bytes, mutate_value

from dlora.edge.training import checkpoint
from dlora.protocol.errors import CheckpointError

STEP = 7


class _State(msgspec.Struct, frozen=True):
    next_step: int
    ticket: bytes
    ages: list[int]


def target(directory: Path) -> Target:
    """The target; ``directory`` is its own."""
    tensors = {
        "a.lora_A": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a.lora_B": np.ones((4, 2), np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(7, np.int64),
    }
    path = checkpoint.save_checkpoint(directory, STEP, tensors, _State(STEP, b"\x00\xff", [1, 2]))
    whole = path.read_bytes()
    path.unlink()
    small = checkpoint.save_checkpoint(directory, STEP, {}, _State(0, b"", []))

    def run(data: bytes) -> None:
        path.write_bytes(data)
        try:
            found = checkpoint.load_latest(directory)
        except CheckpointError:
            return
        assert found is not None
        assert found.step == STEP
        assert sum(tensor.nbytes for tensor in found.tensors.values()) <= len(data)

    return Target("checkpoint", (whole, small.read_bytes()), mutate, run)


def mutate(data: bytes, rng: Random) -> bytes:
    """Change the safetensors header, or the bytes behind it; often write the digest anew."""
    try:
        header, body = open_safetensors(data)
    except ValueError:
        return mutate_bytes(data, rng)
    match rng.randrange(4):
        case 0:
            header = mutate_value(header, rng)
        case 1:
            body = mutate_bytes(body, rng)
        case 2:
            header = _with_state(header, rng)
        case _:
            header, body = mutate_value(header, rng), mutate_bytes(body, rng)
    changed = close_safetensors(header, body)
    return _sealed(changed) if rng.random() < 0.7 else changed


def open_safetensors(data: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file as a value, and what follows. Raises ``ValueError``."""
    length = int.from_bytes(data[:8], "little")
    return decode_json(data[8 : 8 + length]), data[8 + length :]


def close_safetensors(header: Any, body: bytes) -> bytes:
    raw = encode_json(header)
    return len(raw).to_bytes(8, "little") + raw + body


def mutate_safetensors(data: bytes, rng: Random, of_body: float) -> bytes:
    """Change the header of a safetensors file; or, in so many of the cases, the bytes behind it."""
    try:
        header, body = open_safetensors(data)
    except ValueError:
        return mutate_bytes(data, rng)
    if rng.random() < of_body:
        return close_safetensors(header, mutate_bytes(body, rng))
    return close_safetensors(mutate_value(header, rng), body)


def _with_state(header: Any, rng: Random) -> Any:
    """Change what stands inside of the one metadata entry."""
    try:
        inner = decode_json(header["__metadata__"]["dlora-checkpoint"])
    except (KeyError, TypeError, ValueError):
        return mutate_value(header, rng)
    changed = encode_json(mutate_value(inner, rng)).decode()
    return {**header, "__metadata__": {"dlora-checkpoint": changed}}


def _sealed(data: bytes) -> bytes:
    """With a digest that fits, where the file can be read at all."""
    try:
        header, body = open_safetensors(data)
        inner = msgspec.json.decode(header["__metadata__"]["dlora-checkpoint"], type=dict[str, msgspec.Raw])
        tensors = safetensors.numpy.load(data)
        digest = checkpoint._digest(tensors, STEP, bytes(inner["state"]))
        inner |= {"sha256": msgspec.Raw(msgspec.json.encode(digest)), "step": msgspec.Raw(b"%d" % STEP)}
        entry = {"dlora-checkpoint": msgspec.json.encode(inner).decode()}
        return close_safetensors({**header, "__metadata__": entry}, body)
    except Exception:  # whatever keeps us from sealing it: the reader gets it unsealed
        return data
