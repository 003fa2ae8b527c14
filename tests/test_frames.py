"""Frames: golden bytes of every message, round trips, and refusal of everything else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlora.protocol import messages as m
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.errors import NonFiniteError, RemoteProtocolError
from dlora.protocol.frames import HEADER_BLOCK, PREFIX_BYTES, Decoder, encode, frame_bytes, read_prefix, write_checksum
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.kill_revive import KillReviveConfig
from dlora.protocol.tensors import DTYPES, MAX_EXPONENT, SCALED, WireTensor, fp16_exponent, stored_width, tensors_of
from dlora.protocol.wire_codecs import Codecs, decode_floats, encode_floats, is_finite

GOLDEN = Path(__file__).parent / "golden"


def floats(*shape: int, dtype: str = "fp32") -> WireTensor:
    values = (np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 2.5) / 8
    return encode_floats(values, dtype)  # type: ignore[arg-type]


GROUPS = (
    GroupSpec(0, 6, (TargetSpec("layers.0.self_attn.q_proj", 6), TargetSpec("layers.0.self_attn.v_proj", 2))),
    GroupSpec(1, 6, (TargetSpec("layers.1.self_attn.q_proj", 6),)),
)
ints, octets = WireTensor.from_ints, WireTensor.from_bytes
TOKEN = bytes(range(m.RESUME_TOKEN_BYTES))
SEQ, ACK = 5, 4
_FIRST: dict[str, Any] = {"step": 3, "micro_batch": 0}
_INT8_GRADS = floats(3, 6, dtype="int8"), floats(3, 2, dtype="int8")


def open_session(purpose: Any, kind: str, r: int, codecs: Codecs, groups: Any = GROUPS, **more: Any) -> m.OpenSession:
    evaluation_codecs = codecs if isinstance(purpose, m.Encode) else Codecs.all("fp16")
    return m.OpenSession(
        base_fingerprint="ab" * 32, groups=groups, adapter=AdapterSpec(kind=kind, r=r), codecs=codecs,
        evaluation_codecs=evaluation_codecs, purpose=purpose, **more,
    )  # fmt: skip


_TRAIN = m.Train(
    kill_revive=KillReviveConfig(active_fraction=0.125, pinned=(1,)), seed=7, total_steps=100, next_step=3,
    ticket=b"ticket",
)  # fmt: skip
_GIVES = KillReviveConfig(active_fraction=0.5, score="static", on_kill="give_to_server", warmup_steps=0)
_TRAIN_GIVING = m.Train(kill_revive=_GIVES, seed=7, total_steps=100, learnt=(0, 1))
_INT8, _FP16 = Codecs.parse("int8"), Codecs.all("fp16")

# One of each, and what more there is of some; the golden files are only ever added to.
EXAMPLES: dict[str, m.AnyMessage] = {
    "hello": m.Hello(protocol_versions=[2], software="dlora-edge 0.1.0", device="5eed" * 8),
    "welcome": m.Welcome(
        protocol_version=4, software="dlora-cloud 0.1.0", base_model="smollm2-135m", base_fingerprint="ab" * 32,
        base_weight_format="full",
        embedding_size=6, hidden_size=6, max_sequence_length=128, max_tokens=512, packs=False, max_context_length=2048,
    ),
    "open_session": open_session(_TRAIN, "lora", 8, _INT8),
    "open_session_bottleneck": open_session(_TRAIN_GIVING, "bottleneck", 2, _INT8, window=2),
    "open_session_use": open_session(m.Use(), "ffa", 8, _FP16, GROUPS[1:]),
    "open_session_context": open_session(m.Use(context_length=4096), "lora", 8, _FP16, GROUPS[1:]),
    "open_session_use_in_passes": open_session(
        m.Use(context_length=4096, passes=m.Passes(2, 2), drafts="fp16"), "lora", 8, _FP16, GROUPS[1:]
    ),
    "open_session_encode": open_session(m.Encode(blocks=26, width=576), "lora", 8, Codecs.all("int8"), (), window=8),
    "open_session_encode_context": open_session(
        m.Encode(blocks=26, width=576, context_length=4096), "lora", 8, _FP16, ()
    ),
    "make_adapter_state": m.MakeAdapterState(group=3),
    "adapter_state": m.AdapterState(group=1, tensors=(floats(2, 3), floats(3)), gradient_norm=0.5),
    "group_parameters": m.GroupParameters(group=2, tensors=(floats(2, 2),)),
    "session_opened": m.SessionOpened(
        session="0badcafe", units=octets(b"\x01\x00"), ticket=octets(b"signed"), token=TOKEN
    ),
    "resume_session": m.ResumeSession(session="0badcafe", token=TOKEN, received=7),
    "session_resumed": m.SessionResumed(token=TOKEN, received=9),
    "session_gone": m.SessionGone(),
    "embeddings": m.Embeddings(
        **_FIRST, mode="train", hidden_states=floats(3, 6, dtype="fp16"), sequence_lengths=ints([2, 1]),
        label_positions=ints([0, 2]),
    ),
    "embeddings_answers": m.Embeddings(
        **_FIRST, mode="train", hidden_states=floats(3, 6, dtype="int8"), sequence_lengths=ints([2, 1]),
        label_positions=ints([1, 2]), crossing_positions=ints([1, 2]), examples=ints([4, 9]),
    ),
    "embeddings_in_passes": m.Embeddings(
        **_FIRST, mode="train", hidden_states=floats(3, 6, dtype="int8"), sequence_lengths=ints([3]),
        label_positions=ints([2]), passes=m.Passes(2, 1),
    ),
    "embeddings_of_kept_reads": m.Embeddings(
        **_FIRST, mode="train", hidden_states=floats(3, 6, dtype="int8"), sequence_lengths=ints([3]),
        label_positions=ints([2]), passes=m.Passes(2, 2), kept_reads=bytes(range(16)),
    ),
    "embeddings_basis_of_token_ids": m.Embeddings(
        step=0, micro_batch=1, mode="basis", hidden_states=None, sequence_lengths=ints([3]), label_positions=ints([1]),
        crossing_positions=ints([]), token_ids=ints([7, 300, 49151]),
    ),
    "embeddings_decode": m.Embeddings(
        step=0, micro_batch=9, mode="decode", hidden_states=floats(3, 6, dtype="fp16"), sequence_lengths=ints([3]),
        label_positions=ints([0, 1, 2]), decoding=m.Decoding(300),
    ),
    "embeddings_decode_in_passes": m.Embeddings(
        step=0, micro_batch=10, mode="decode", hidden_states=floats(2, 6, dtype="fp16"), sequence_lengths=ints([2]),
        label_positions=ints([0, 1]), decoding=m.Decoding(303, ahead=6, is_ahead=True), passes=m.Passes(2, 2),
    ),
    "draft_tokens": m.DraftTokens(**_FIRST, token_ids=ints([7, 300, 49151]), computed_s=0.125),
    "embeddings_encode": m.Embeddings(
        step=0, micro_batch=2, mode="encode", hidden_states=floats(3, 6, dtype="fp16"), sequence_lengths=ints([1, 2]),
        label_positions=ints([]),
    ),
    "encoded_hidden_states": m.EncodedHiddenStates(
        step=0, micro_batch=2, hidden_states=(floats(1, 6, dtype="fp16"), floats(2, 6, dtype="fp16"))
    ),
    "group_input": m.GroupInput(**_FIRST, groups=(1,), hidden_states=floats(3, 6), times=(0.5, 1.0, 1.0, 2.0)),
    "group_input_of_several": m.GroupInput(**_FIRST, groups=(1, 2), hidden_states=floats(6, 3, dtype="int4")),
    "group_delta": m.GroupDelta(**_FIRST, groups=(0,), deltas=(floats(3, 6), floats(3, 2))),
    "labelled_hidden_states": m.LabelledHiddenStates(
        **_FIRST, hidden_states=floats(2, 6), gradients=2, computed_s=0.5
    ),
    "labelled_hidden_states_with_more_ahead": m.LabelledHiddenStates(
        **_FIRST, hidden_states=floats(2, 6), gradients=0, next_token=49151, computed_s=0.5
    ),
    "grad_hidden_states": m.GradHiddenStates(**_FIRST, grad_hidden_states=floats(2, 6, dtype="fp16")),
    "group_grad": m.GroupGrad(**_FIRST, groups=(0,), grads=_INT8_GRADS, answer=False, computed_s=0.75, queued_s=0.25),
    "group_grad_of_a_later_pass": m.GroupGrad(
        **_FIRST, groups=(3, 1), grads=(floats(6, 4, dtype="int4"),), answer=True, backward_pass=1
    ),
    "group_input_grad": m.GroupInputGrad(**_FIRST, groups=(1,), grad_hidden_states=floats(3, 6)),
    "step_report": m.StepReport(step=3, scores=WireTensor("fp32", np.array([0.5, 0.0], np.float32))),
    "signal": m.Signal(step=3, units=octets(b"\x01\x02"), ticket=octets(b"signed")),
    "close_session": m.CloseSession(),
    "error": m.Error(code="busy", message="the server is full", retryable=True, retry_after_s=5.0),
}  # fmt: skip


def test_every_message_has_an_example() -> None:
    assert {type(message) for message in EXAMPLES.values()} == set(m.AnyMessage.__args__)


@pytest.mark.parametrize("name", EXAMPLES)
def test_golden_bytes_both_ways(name: str) -> None:
    golden = (GOLDEN / f"{name}.bin").read_bytes()
    assert bytes(encode(EXAMPLES[name], seq=SEQ, ack=ACK)) == golden
    assert read_prefix(golden)[1:3] == (SEQ, ACK)
    assert Decoder().decode(golden) == EXAMPLES[name]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_frame_has_the_size_that_the_formula_gives_and_nothing_behind(name: str) -> None:
    frame = encode(EXAMPLES[name])
    blocks = -(-(PREFIX_BYTES + read_prefix(frame).header_length) // HEADER_BLOCK)
    assert len(frame) == frame_bytes(blocks, [tensor.nbytes for tensor in tensors_of(EXAMPLES[name])])
    with pytest.raises(RemoteProtocolError, match="left over"):
        Decoder().decode(write_checksum(frame + b"\0"))


def test_a_micro_batch_in_passes_begins_with_a_header_of_one_block() -> None:
    """As the formula of traffic has it, with the largest numbers that there are."""
    rows = 2**16 - 1
    begun = m.Embeddings(
        step=2**32 - 1, micro_batch=2**16 - 1, mode="train", hidden_states=encode_floats(np.zeros((rows, 1)), "int8"),
        sequence_lengths=ints([1] * rows), label_positions=ints(range(rows)), crossing_positions=ints(range(rows)),
        passes=m.Passes(4, 4), kept_reads=bytes(16),
    )  # fmt: skip
    assert PREFIX_BYTES + read_prefix(encode(begun)).header_length <= HEADER_BLOCK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (3, 0), (1, 2, 3), (2, 1, 2, 1)])
def test_tensors_of_any_kind_and_shape_come_as_they_went(dtype: str, shape: tuple[int, ...]) -> None:
    """Whatever their bits."""
    width = math.prod(shape[1:])
    if dtype in SCALED:  # in memory it has two dimensions, whatever a frame may say
        shape = shape[0] if shape else 1, stored_width(dtype, width)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    data = np.frombuffer(np.random.default_rng(0).bytes(nbytes), DTYPES[dtype]).reshape(shape)
    for exponent in (0, -127, -1, 1, 113, 127) if dtype == "fp16" else (0,):
        tensor = WireTensor(dtype, data, exponent, width if dtype == "int4" else None)
        message = m.GroupDelta(**_FIRST, groups=(0,), deltas=(tensor, *_INT8_GRADS))
        assert Decoder().decode(encode(message)) == message


def test_decoded_tensors_are_views_that_cannot_be_written() -> None:
    frame = bytes(encode(EXAMPLES["group_input"]))
    message = Decoder().decode(frame)
    assert isinstance(message, m.GroupInput)
    data = message.hidden_states.data
    assert not data.flags.owndata
    assert not data.flags.writeable
    assert np.shares_memory(data, np.frombuffer(frame, np.uint8))


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"step": -1},
        {"step": 2**40},
        {"step": "3"},
        {"type": "group_outpt"},
        {"hidden_states": ["fp32", [2**31, 2**31], 0]},
        {"hidden_states": ["fp32", [2**30, 6], 0]},
        {"hidden_states": ["fp32", [-3, 6], 0]},
        {"hidden_states": ["fp32", [1, 1, 1, 1, 18], 0]},
        {"hidden_states": ["fp64", [3, 6], 0]},
        {"hidden_states": ["fp32", [3, 6], 5]},
        {"hidden_states": ["fp16", [6, 6], 999]},
        {"hidden_states": ["fp16", [6, 6], True]},
        *({"hidden_states": ["int8", shape, 0]} for shape in ([72], [1, 70, 1], [])),
        {"hidden_states": ["fp32", [3, 5], 0]},
        {"hidden_states": ["fp32", [True, 18], 0]},
        {"hidden_states": None},
    ],
    ids=str,
)
def test_changed_headers_are_refused(change: dict[str, object]) -> None:
    frame = bytes(encode(EXAMPLES["group_input"]))
    length = read_prefix(frame).header_length
    header = msgspec.msgpack.encode(msgspec.msgpack.decode(frame[PREFIX_BYTES : PREFIX_BYTES + length]) | change)
    block = len(header).to_bytes(4, "little") + frame[4:PREFIX_BYTES] + header
    changed = write_checksum(bytearray(block + bytes(-len(block) % HEADER_BLOCK) + frame[HEADER_BLOCK:]))
    with pytest.raises(RemoteProtocolError):
        Decoder().decode(changed)


def test_a_header_beyond_the_limit_is_refused_unseen() -> None:
    with pytest.raises(RemoteProtocolError, match="header too long") as raised:
        Decoder().decode(write_checksum(bytearray(((1 << 22) + 1).to_bytes(PREFIX_BYTES, "little"))))
    assert raised.value.code == "limit"


@pytest.mark.parametrize("where", [HEADER_BLOCK - 1, HEADER_BLOCK + 3 * 6 * 4])
def test_padding_must_be_zero(where: int) -> None:
    """After the header, and between two tensors."""
    frame = bytearray(encode(EXAMPLES["group_delta"]))
    frame[where] = 1
    with pytest.raises(RemoteProtocolError, match="padding"):
        Decoder().decode(write_checksum(frame))


@given(
    st.lists(st.floats(-1024, 1024, width=32, allow_nan=False), min_size=1, max_size=40),
    st.integers(-100, 80),
)
def test_fp16_keeps_its_relative_precision_at_any_magnitude(values: list[float], shift: int) -> None:
    array = np.array(values, np.float32) * np.float32(2.0**-shift)
    tensor = encode_floats(array, "fp16")
    peak = float(np.abs(array).max())
    # Half a unit in the last place of the peak; below 2**-111 the exponent itself runs out.
    assert np.abs(decode_floats(tensor) - array).max() <= max(peak, 2.0**-111) * 2.0**-11
    assert is_finite(tensor)


def test_fp16_exponent_puts_the_peak_below_the_largest_half() -> None:
    for peak in (1e-38, 1e-20, 6e-5, 1.0, 5260.0, 65504.0, 1e30, 3e38):
        scaled = peak * 2.0 ** -fp16_exponent(peak)
        assert 0 < scaled < 65504
    assert fp16_exponent(1e-300) == -MAX_EXPONENT + 1  # whose power of two is no denormal


@pytest.mark.parametrize(("dtype", "stored"), [("fp32", np.float32), ("fp16", np.float16)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_not_sent_and_are_seen_where_they_come(dtype: Any, stored: type, value: float) -> None:
    data = np.ones((2, 3), stored)
    assert is_finite(WireTensor(dtype, np.full(5, np.finfo(stored).max)))
    data[1, 2] = value
    assert not is_finite(WireTensor(dtype, data))
    with pytest.raises(NonFiniteError):
        encode_floats(data.astype(np.float32), dtype)
