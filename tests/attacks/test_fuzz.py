"""Whatever the bytes: a value, or the documented error. Fuzzing, short and seeded, and the properties behind it."""

from __future__ import annotations

import importlib
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random, randrange

import conversations as c
import pytest
from attacks import fuzz_checkpoint, fuzz_session
from attacks.fuzz import TARGETS
from attacks.fuzz_decoder import EXAMPLES, sealed
from attacks.fuzz_session import OPENING
from attacks.fuzz_target import Target, join, mutate_bytes, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dlora.edge.adapters.peft import CONFIG_NAME, load_adapter
from dlora.edge.data.records import read_records
from dlora.edge.engine.bundle import Bundle
from dlora.edge.training.checkpoint import load_latest
from dlora.protocol import messages as m
from dlora.protocol.errors import BundleError, CheckpointError, DamagedFrameError, DataError, RemoteProtocolError
from dlora.protocol.frames import HEADER_BLOCK, Decoder, encode
from dlora.protocol.manifest import MANIFEST_NAME, FileSpec, check_file
from dlora.protocol.session import Session
from dlora.protocol.states import Side
from dlora.protocol.tensors import WireTensor

HERE = Path(__file__).parent


def made(name: str, directory: Path) -> Target:
    target: Target = importlib.import_module(f"attacks.fuzz_{name}").target(directory)
    return target


# -- the targets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs_raise_only_documented_errors(name: str, tmp_path: Path) -> None:
    """What ``fuzz.py`` does, without coverage: chains of mutations, always the same ones."""
    run_mutated(made(name, tmp_path), 0, 1500)


def run_mutated(target: Target, seed: int, inputs: int) -> None:
    rng = Random(seed)
    pool = list(target.corpus)
    for data in pool:
        target.run(data)
    for _ in range(inputs):
        data = target.mutate(rng.choice(pool), rng)
        target.run(data)
        if len(data) < 20_000 and rng.random() < 0.2:
            pool.append(data)


@pytest.mark.parametrize("name", ["decoder", "session"])
def test_changed_frames_get_past_the_checksum(name: str, tmp_path: Path) -> None:
    """Ours are sealed, and so are those of atheris; else hardly any would reach what reads a header."""
    target, rng = made(name, tmp_path), Random(1)
    for change in (target.mutate, lambda data, rng: target.sealed(mutate_bytes(data, rng))):
        past_checksum = parsed = 0
        for _ in range(100):
            data = change(rng.choice(target.corpus), rng)
            for frame in [data] if name == "decoder" else [frame for _, frame in fuzz_session.records(data[1:])]:
                try:
                    DECODER.decode(frame)
                except DamagedFrameError:
                    continue
                except RemoteProtocolError as error:
                    parsed += str(error).startswith("malformed header")
                else:
                    parsed += 1
                past_checksum += 1
        assert past_checksum > 50
        assert parsed > 5  # many changes break the padding, or a length


@pytest.mark.parametrize("path", sorted((HERE / "found").glob("*.bin")), ids=lambda path: path.stem)
def test_inputs_that_failed_before_pass(path: Path, tmp_path: Path) -> None:
    made(path.stem.partition("-")[0], tmp_path).run(path.read_bytes())


def test_fuzz_command_runs(tmp_path: Path) -> None:
    """Coverage-guided, in a process of its own, for two seconds."""
    pytest.importorskip("atheris", reason="no atheris: pip install --group fuzz, then run this file again")
    command = [sys.executable, str(HERE / "fuzz.py"), "decoder", "--seconds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["executions"] > len(EXAMPLES)
    assert result["coverage"] > 0
    assert result["crashes"] == 0


# -- frames ----------------------------------------------------------------------------------------------

DECODER = Decoder()


@pytest.mark.slow
def test_many_mutated_frames_decode_or_are_refused(tmp_path: Path) -> None:
    """Others each time."""
    seed = randrange(2**32)
    print("seed", seed)
    run_mutated(made("decoder", tmp_path), seed, 20_000)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_truncated_or_changed_frame_is_refused(message: m.AnyMessage) -> None:
    frame = encode(message, seq=3, ack=2)
    for at in range(len(frame)):
        with pytest.raises(RemoteProtocolError):
            DECODER.decode(frame[:at])
        changed = frame.copy()
        changed[at] ^= 0x10
        with pytest.raises(DamagedFrameError):
            DECODER.decode(changed)


def header_of(fields: bytes, fill: bytes, times: int) -> bytes:
    """A frame whose header is ``fields`` and then an array of ``times`` times ``fill``; no tensors."""
    header = fields + b"\xdd" + times.to_bytes(4, "big") + fill * times
    frame = struct.pack("<IIII", len(header), 1, 0, 0) + header
    return sealed(frame.ljust(-(-len(frame) // HEADER_BLOCK) * HEADER_BLOCK, b"\0"))


OPEN = b"\x82\xa4type\xacopen_session"
GROUP = b"\xa4step\x00\xabmicro_batch\x00\xa5group\x00"


@pytest.mark.parametrize(
    ("fields", "fill"),
    [
        (b"\x85\xa4type\xabgroup_input" + GROUP + b"\xadhidden_states", b"\x80"),
        (b"\x85\xa4type\xabgroup_input" + GROUP + b"\xadhidden_states", b"\x90"),
        (b"\x85\xa4type\xabgroup_delta" + GROUP + b"\xa6deltas", b"\x93\xa4fp32\x91\x00\x00"),
        (b"\x82\xa4type\xa5hello\xb1protocol_versions", b"\x01"),
        (OPEN + b"\xa7purpose\x82\xa7purpose\xa5train\xabkill_revive\x81\xa6pinned", b"\x01"),
        (OPEN + b"\xa6groups", b"\x80"),
    ],
    ids=["maps for a tensor", "arrays for a tensor", "a million tensors", "versions", "pinned units", "groups"],
)
def test_small_frame_never_takes_much_memory(fields: bytes, fill: bytes) -> None:
    """msgpack's empty map is one byte on the wire and 64 in memory."""
    frame = header_of(fields, fill, ((1 << 22) - 200) // len(fill))
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            Decoder().decode(frame)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(frame)


# -- sessions --------------------------------------------------------------------------------------------

EDGES = st.sampled_from((0, 1, 2, 3, 2**31 - 1, 2**31 - 2, -1, -2, -(2**31)))


def check_embeddings(positions: list[int], lengths: list[int]) -> None:
    message = c.embeddings(
        label_positions=WireTensor.from_ints(positions), sequence_lengths=WireTensor.from_ints(lengths)
    )
    valid = (
        0 < len(positions) == len(set(positions))
        and positions == sorted(positions)
        and positions[0] >= 0
        and positions[-1] < c.TOKENS
        and len(lengths) > 0
        and min(lengths) > 0
        and sum(lengths) == c.TOKENS
    )
    session = Session(Side.CLOUD)
    for said in OPENING:
        session.receive(encode(said)) if isinstance(said, c.FROM_EDGE) else session.send(said)
    try:
        c.hear(session, message)
    except RemoteProtocolError:
        assert not valid
    else:
        assert valid


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(EDGES, max_size=5), st.lists(EDGES, min_size=1, max_size=3) | st.just([c.TOKENS]))
def test_embeddings_are_accepted_only_if_valid(positions: list[int], lengths: list[int]) -> None:
    check_embeddings(positions, lengths)


@pytest.mark.parametrize("positions", [[0, 2**31 - 1, -2, 1], [1, -(2**31)]])
def test_positions_whose_differences_overflow_are_refused(positions: list[int]) -> None:
    # As int32, each difference of neighbours is positive.
    check_embeddings(positions, [c.TOKENS])


# -- files -----------------------------------------------------------------------------------------------


def damaged_copies(whole: bytes) -> Iterator[bytes]:
    """With one byte changed, or ending early; always the same ones."""
    rng = Random(0)
    for _ in range(300):
        at = rng.randrange(len(whole))
        flipped = bytes([whole[at] ^ rng.randrange(1, 256)])
        yield whole[:at] if rng.random() < 0.2 else whole[:at] + flipped + whole[at + 1 :]


def test_damaged_checkpoint_loads_unchanged_or_is_refused(tmp_path: Path) -> None:
    whole = made("checkpoint", tmp_path).corpus[0]
    path = tmp_path / f"checkpoint-{fuzz_checkpoint.STEP:06d}.safetensors"
    loaded = []
    for content in (whole, *damaged_copies(whole)):
        path.write_bytes(content)
        with suppress(CheckpointError):
            found = load_latest(tmp_path)
            assert found is not None
            loaded.append((found.state, {name: (t.dtype, t.shape, t.tobytes()) for name, t in found.tensors.items()}))
    assert loaded  # the whole one, at least
    assert all(each == loaded[0] for each in loaded)


@pytest.mark.parametrize("name", ["adapter", "manifest"])
def test_damaged_files_without_a_digest_load_or_are_refused(name: str, tmp_path: Path) -> None:
    """A changed weight of PEFT's cannot be told; a changed shape, name or kind can."""
    target = made(name, tmp_path)
    first, second = split(target.corpus[0])
    for content in damaged_copies(first):
        target.run(join(content, second))
    for content in damaged_copies(second):
        target.run(join(first, content))


def test_a_damaged_file_of_a_bundle_is_refused(tmp_path: Path) -> None:
    described, weight = split(made("manifest", tmp_path).corpus[0])
    (tmp_path / MANIFEST_NAME).write_bytes(described)
    for content in damaged_copies(weight):
        (tmp_path / "embedding.npy").write_bytes(content)
        with pytest.raises(BundleError, match="is damaged"):
            Bundle.open(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "embedding.npy/x"])
def test_unsafe_file_names_in_a_manifest_are_refused(tmp_path: Path, name: str) -> None:
    """Others: ``test_bundle_paths.py``."""
    described, weight = split(made("manifest", tmp_path).corpus[0])
    value = json.loads(described)
    value["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(value))
    (tmp_path / "embedding.npy").write_bytes(weight)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path)


def test_pipe_in_a_bundle_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="no regular file"):
        check_file(tmp_path, "pipe", FileSpec(0, "0" * 64))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 0.5}, "whole number"),
        ({"lora_alpha": 10**19}, "below 2"),
        ({"rank_pattern": 5}, "must be an object"),
        ({"rank_pattern": ["q_proj"]}, "must be an object"),
        ({"rank_pattern": {"q_proj": 0.5}}, "whole number"),
        ({"alpha_pattern": {"a{4294967296}": 1}}, "name the modules"),
        ({"alpha_pattern": {"(a|a)*b": 1}}, "name the modules"),
        ({"alpha_pattern": {"(?x:(a|aa) +b)": 1}}, "name the modules"),
    ],
)
def test_invalid_adapter_settings_are_refused(tmp_path: Path, changes: dict[str, object], text: str) -> None:
    made("adapter", tmp_path)
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=text):
        load_adapter(tmp_path)


MARKS = st.lists(st.sampled_from('",\n\ra\0{}[]1:'), max_size=60)


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(max_size=60) | MARKS.map(lambda marks: "".join(marks).encode()), st.sampled_from(("csv", "tsv", "jsonl"))
)
def test_any_training_file_gives_rows_or_a_data_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    path.write_bytes(content)
    with suppress(DataError):
        assert all(isinstance(row.fields, dict) for row in read_records(path))
