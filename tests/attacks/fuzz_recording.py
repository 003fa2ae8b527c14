"""Fuzz target: a recording's frames and its truth, as ``dlora-cloud audit`` reads them. Both, or ``DataError``.

An input is the frames and the truth, one after the other.
"""

from __future__ import annotations

import io
from pathlib import Path
from random import Random
from typing import Any, Final

import conversations as c
import msgspec
import numpy as np
import safetensors.numpy
from attacks.fuzz_checkpoint import close_safetensors, mutate_safetensors, open_safetensors
from attacks.fuzz_decoder import mutate as mutate_frame
from attacks.fuzz_target import Target, decode_json, encode_json, join, mutate_bytes, mutate_value, split

from dlora.cloud.audit.observed import observe
from dlora.cloud.audit.truth import Truth, load_truth
from dlora.protocol.adapters import kind_of
from dlora.protocol.errors import DataError
from dlora.protocol.frames import encode
from dlora.protocol.recording import FRAMES_FILE, ID_BYTES, TRUTH_FILE, FramesWriter, read_recording
from dlora.protocol.states import Side

ID: Final = bytes(ID_BYTES)


def target(directory: Path) -> Target:
    """The target; ``directory`` is its own."""
    frames, truth = directory / FRAMES_FILE, directory / TRUTH_FILE

    def run(data: bytes) -> None:
        first, rest = split(data)
        frames.write_bytes(first)
        truth.write_bytes(rest)
        try:
            recording = read_recording(directory)
            seen = observe(recording)
            found = load_truth(directory, recording.id, seen)
        except DataError:
            return
        assert sum(len(each.frame) for each in recording.frames) <= len(first)
        assert nbytes(found) <= 2 * len(rest)  # numbers of 32 bits are widened

    return Target("recording", (join(small_frames(), small_truth()),), mutate, run)


def nbytes(truth: Truth) -> int:
    """Of all that a truth holds."""
    arrays = [array for each in truth.micro_batches for array in (each.ids, each.lengths, each.labels)]
    arrays += [array for each in truth.parameters for group in each.groups for array in group.values()]
    arrays += [array for each in truth.gradients for array in each.values.values()]
    return sum(array.nbytes for array in arrays)


def small_frames() -> bytes:
    """Of a step with two micro-batches."""
    file = io.BytesIO()
    writer = FramesWriter(file, ID)
    said = [*c.opening(), *c.forward(), *c.backward(), *c.forward(0, 1), *c.backward(0, 1), c.report(), c.signal()]
    for at, message in enumerate(said):
        writer.add(at / 8, encode(message), up=c.sender_of(message) is Side.EDGE)
    return file.getvalue()


def small_truth() -> bytes:
    """Its truth, as a device writes it."""
    opening = c.open_session()
    shapes = [kind_of(opening.adapter).parameter_shapes(opening.adapter, group) for group in c.GROUPS]
    tensors: dict[str, Any] = {}
    for index in range(2):
        tensors[f"micro_batch.{index}.ids"] = np.arange(c.TOKENS)
        tensors[f"micro_batch.{index}.lengths"] = np.array([1, c.TOKENS - 1], np.int32)
        tensors[f"micro_batch.{index}.label_positions"] = np.array([0, 2], np.int32)
        tensors[f"micro_batch.{index}.labels"] = np.arange(c.LABELLED)
    for name, shape in (item for group in shapes for item in group.items()):
        tensors[f"parameters.0.{name}"] = np.ones(shape, np.float32)
        tensors[f"gradients.0.{name}"] = np.ones(shape, np.float32)
    tensors["example.0.ids"] = np.arange(5, dtype=np.int32)
    tensors["example.0.label_positions"] = np.array([1, 3], np.int32)
    about = {
        "format": 1, "recording": ID.hex(), "software": "a device", "modes": ["train", "train"], "examples": 1,
        "snapshots": [{"micro_batch": 0, "scales": [1.0] * len(shapes), "names": [list(group) for group in shapes]}],
        "gradients": [{"snapshot": 0, "first": 0, "end": 2}], "seed_was_chosen": False,
    }  # fmt: skip
    return safetensors.numpy.save(tensors, {"truth": msgspec.json.encode(about).decode()})


def mutate(data: bytes, rng: Random) -> bytes:
    """Change a frame and seal it anew, the order of frames, the truth's description or tensors, or any bytes."""
    frames, truth = split(data)
    match rng.randrange(6):
        case 0:
            return join(mutate_bytes(frames, rng), truth)
        case 1 | 2:
            return join(with_frame(frames, rng), truth)
        case 3:
            return join(frames, with_about(truth, rng))
        case 4:
            return join(frames, with_tensors(truth, rng))
        case _:
            return mutate_bytes(data, rng)


_HEAD: Final = 32  # of frames.bin, and of a record before its frame
_RECORD: Final = 13


def records(frames: bytes) -> list[tuple[bytes, bytes]]:
    """What stands before each frame, without its length, and the frame."""
    found, at = [], _HEAD
    while at + _RECORD <= len(frames):
        length = int.from_bytes(frames[at + 8 : at + 12], "little")
        head, at = frames[at : at + 8] + frames[at + 12 : at + 13], at + _RECORD
        found.append((head, frames[at : at + length]))
        at += length
    return found


def with_frame(frames: bytes, rng: Random) -> bytes:
    """One frame changed and sealed, left out, or said again, later or by the other side."""
    found = records(frames)
    if not found:
        return mutate_bytes(frames, rng)
    at = rng.randrange(len(found))
    head, frame = found[at]
    match rng.randrange(5):
        case 0:
            del found[at]
        case 1:
            found.insert(rng.randrange(len(found) + 1), found[at])
        case 2:
            found[at] = head[:8] + bytes([1 - head[8] & 1]), frame
        case _:
            found[at] = head, mutate_frame(frame, rng)
    joined = b"".join(head[:8] + len(frame).to_bytes(4, "little") + head[8:] + frame for head, frame in found)
    return frames[:_HEAD] + joined


def with_about(truth: bytes, rng: Random) -> bytes:
    """Another description of the same tensors."""
    try:
        header, body = open_safetensors(truth)
        about = decode_json(header["__metadata__"]["truth"])
        changed = {**header, "__metadata__": {"truth": encode_json(mutate_value(about, rng)).decode()}}
    except (KeyError, TypeError, ValueError):
        return mutate_bytes(truth, rng)
    return close_safetensors(changed, body)


def with_tensors(truth: bytes, rng: Random) -> bytes:
    """Other tensors, with the same description: in the header or in the bytes behind it."""
    return mutate_safetensors(truth, rng, 0.5)
