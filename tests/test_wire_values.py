"""Values that only look harmless on the wire."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from dlora.cloud.exchange.kept_tensor import KeptTensor, multiply
from dlora.cloud.exchange.torch_codecs import TORCH_CODECS, from_wire
from dlora.protocol import messages as m
from dlora.protocol.choices import DifferenceDtype, WireDtype
from dlora.protocol.errors import NonFiniteError, UsageError
from dlora.protocol.frames import Decoder, encode
from dlora.protocol.tensors import MAX_EXPONENT, SCALE_BYTES, WireTensor
from dlora.protocol.wire_codecs import CODECS, Codecs, TensorRole, decode_floats, encode_floats, is_finite


@pytest.mark.parametrize("exponent", [112, 113, 120, MAX_EXPONENT])
@pytest.mark.parametrize("value", [1.0, 32752.0, 65504.0, -65504.0])
def test_half_with_an_exponent_beyond_float32_is_not_finite(value: float, exponent: int) -> None:
    tensor = WireTensor("fp16", np.array([value], np.float16), exponent)
    assert is_finite(tensor) == (abs(value) * 2.0**exponent <= float(np.finfo(np.float32).max))


@pytest.mark.parametrize("peak", [3.4e38, 1e30, 1.0, 1e-30, 1e-45])
def test_everything_that_we_send_is_finite(peak: float) -> None:
    assert is_finite(encode_floats(np.array([peak, -peak / 3, 0], np.float32), "fp16"))


def test_server_has_each_codec_of_the_device() -> None:
    assert list(TORCH_CODECS) == list(CODECS)
    assert set(Codecs.__struct_fields__) == {role.value for role in TensorRole}


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("peak", [0.0, 1e-30, 3e-5, 1.0, 2.0**15, 7e4, 1e30])
def test_both_sides_put_the_same_bits_on_the_wire(peak: float, name: WireDtype) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (5, 7)).astype(np.float32) * np.float32(peak)
    tensor = encode_floats(values, name)
    assert TORCH_CODECS[name].encode(torch.from_numpy(values)) == tensor
    assert tensor.nbytes == CODECS[name].nbytes(*values.shape)
    decoded = from_wire(tensor, torch.device("cpu"), torch.float32)
    assert decoded.numpy().tobytes() == np.ascontiguousarray(decode_floats(tensor)).tobytes()


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("name", CODECS)
def test_what_is_kept_as_it_crossed_multiplies_as_its_values_in_float32(name: WireDtype, decoded: bool) -> None:
    rng = np.random.default_rng(0)
    tensor = encode_floats(rng.standard_normal((12, 7)).astype(np.float32), name)
    kept = KeptTensor.of(tensor, torch.device("cpu"), decoded=decoded)
    assert kept.stored.nbytes == CODECS["fp32" if decoded else name].nbytes(12, 7)
    parts, whole = kept.split([5, 7]), torch.from_numpy(decode_floats(tensor).copy())
    for part, values in zip(parts, whole.split([5, 7]), strict=True):
        ours = torch.from_numpy(rng.standard_normal((3, 7)).astype(np.float32))
        theirs = ours.clone()
        product, wanted = multiply(ours.requires_grad_(), part), theirs.requires_grad_() @ values.T
        assert torch.equal(product, wanted)
        grad = torch.from_numpy(rng.standard_normal(product.shape).astype(np.float32))
        product.backward(grad)
        wanted.backward(grad)
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_int8_keeps_each_row_to_its_own_scale() -> None:
    """A row that is a million times larger than the next costs that one nothing."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((64, 48)) * 10.0 ** rng.uniform(-12, 12, (64, 1))).astype(np.float32)
    values[5] = 0
    decoded = decode_floats(encode_floats(values, "int8"))
    # Half a unit of a scale that is at most 1/128 above its row's peak over 127.
    assert (np.abs(decoded - values) <= np.abs(values).max(axis=1, keepdims=True) / 127 * 0.504).all()
    assert not decoded[5].any()


@pytest.mark.parametrize("scale", [2.0**120, -(2.0**121), np.inf, np.nan])
def test_int8_with_too_large_a_scale_is_not_finite(scale: float) -> None:
    tensor = encode_floats(np.ones((2, 3), np.float32), "int8")
    assert is_finite(tensor)
    data = tensor.data.copy()
    data[1, -SCALE_BYTES:] = np.array([scale], "<f4").view(np.uint8)[2:]
    assert not is_finite(WireTensor("int8", data))


def test_codecs_as_users_write_them() -> None:
    assert Codecs.parse("fp16") == Codecs.all("fp16")
    int8 = Codecs.parse("int8")
    assert int8.group_parameters == "fp16"
    assert int8.difference == "int4"
    others = set(TensorRole) - {TensorRole.GROUP_PARAMETERS, TensorRole.DIFFERENCE}
    assert {getattr(int8, role.value) for role in others} == {"int8"}
    assert Codecs.parse("int8,difference=int8").difference == "int8"
    assert Codecs.parse("fp16,difference=int4").difference == "int4"
    assert Codecs.parse("int8, embeddings=fp16,last_hidden_states=fp32").embeddings == "fp16"
    for text in ("int4", "", "fp16,embeddings", "fp16,nothing=int8", "fp16,embeddings=int4"):
        with pytest.raises(UsageError, match="--wire-dtype"):
            Codecs.parse(text)


def test_evaluations_cross_as_fp16_unless_all_is_fp32() -> None:
    """But for differences, where those cross as integers in training."""
    for text, name, difference in (
        ("int8", "fp16", "int8"), ("fp16", "fp16", "fp16"), ("fp32,embeddings=int8", "fp16", "fp16"),
        ("fp16,difference=int4", "fp16", "int8"), ("fp32", "fp32", "fp32"),
    ):  # fmt: skip
        wanted = msgspec.structs.replace(Codecs.all(name), difference=difference)
        assert Codecs.parse(text).for_evaluation() == wanted


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("width", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
def test_integers_of_any_shape_are_the_same_on_both_sides(rows: int, width: int, dtype: DifferenceDtype) -> None:
    """As it comes in a frame, too: a single row is as long as it is wide, and its scale may begin at an odd byte."""
    values = np.random.default_rng(rows * 10 + width).standard_normal((rows, width)).astype(np.float32)
    tensor = encode_floats(values, dtype)
    assert TORCH_CODECS[dtype].encode(torch.from_numpy(values)) == tensor
    frame = encode(m.GroupInput(step=0, micro_batch=0, groups=(0,), hidden_states=tensor), seq=1, ack=0)
    message = Decoder().decode(frame)
    assert isinstance(message, m.GroupInput)
    for received in (tensor, message.hidden_states):
        decoded = from_wire(received, torch.device("cpu"), torch.float32).numpy()
        assert decoded.tobytes() == np.ascontiguousarray(decode_floats(received)).tobytes()
        assert decoded.shape == (rows, width)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_what_is_too_large_for_integers_is_not_sent(dtype: DifferenceDtype) -> None:
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        encode_floats(np.full((1, 3), np.nan, np.float32), dtype)
    values = np.full((1, 3), 3e38, np.float32)
    for send in (lambda: encode_floats(values, dtype), lambda: TORCH_CODECS[dtype].encode(torch.from_numpy(values))):
        with pytest.raises(NonFiniteError, match=f"too large for {dtype}"):
            send()


@pytest.mark.parametrize(("dtype", "steps"), [("int8", 254), ("int4", 14)])
def test_integers_are_off_by_half_a_step_at_most(dtype: DifferenceDtype, steps: int) -> None:
    values = np.random.default_rng(3).standard_normal((5, 7)).astype(np.float32)
    errors = np.abs(decode_floats(encode_floats(values, dtype)) - values).max(axis=1)
    # A scale is rounded up, to eight bits of precision.
    assert (errors <= np.abs(values).max(axis=1) / steps * (1 + 2**-7) * (1 + 1e-6)).all()


def test_fp16_of_what_was_fp16_twice_is_the_same() -> None:
    """Where the largest value rounds up to a power of two, the exponent of the second time is another."""
    codec = CODECS["fp16"]
    values = np.array([0.99999, *(np.arange(1, 40) * 2.0**-31)], np.float32)
    once = codec.encode(values)
    twice = codec.encode(codec.decode(once))
    assert twice != once
    assert codec.encode(codec.decode(twice)) == twice
