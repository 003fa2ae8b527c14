"""The first blocks alone: what a server gives a device that runs the others itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from serving import serving
from tiny import Tiny, TinyFactory

from dlora.cloud.model.base_model import BaseModel
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.edge.model.encoder import Encoder
from dlora.edge.model.ends import LongArray
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.connection import Connection
from dlora.protocol import messages as m
from dlora.protocol.errors import DataError, RefusedError
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import Codecs, decode_floats

LENGTHS = (5, 3, 9, 1, 4, 8)


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(head_dtype="fp32")  # and so the embedding


def texts(vocabulary: int, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[LongArray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, length) for length in lengths]


@contextmanager
def encoder(
    url: str, model: Tiny, wire_dtype: Any = "fp32", send: Any = "embeddings", **purpose: Any
) -> Iterator[Encoder]:
    bundle = Bundle.open(model.bundle)
    codecs = Codecs.parse(wire_dtype)
    settings = {"blocks": 1, "width": bundle.manifest.base_model.hidden_size, **purpose}
    with Connection(url, ConnectSettings(retry=Retry(max_s=30))) as connection:
        yield Encoder(bundle, OnnxEngine(bundle, 1), connection, m.Encode(**settings), codecs, send)


def encode(ask: Encoder, given: list[LongArray]) -> list[WireTensor]:
    """Of all texts, in order, as one pack."""
    return [tensor for tensors in ask.encode([given]) for tensor in tensors]


def after_blocks(base: BaseModel, ids: LongArray, blocks: int) -> np.ndarray[Any, Any]:
    """What torch has there, by a hook: (tokens, width)."""
    kept: list[torch.Tensor] = []
    block = base.block_modules[blocks - 1]
    handle = block.register_forward_hook(
        lambda _module, _args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        base.last_hidden_state(base.token_embedding(torch.from_numpy(ids)[None]))
    handle.remove()
    return kept[0][0].numpy()


def check(model: Tiny, found: list[WireTensor], given: list[LongArray], tolerance: float, blocks: int = 1) -> None:
    assert len(found) == len(given)
    for tensor, ids in zip(found, given, strict=True):
        wanted = after_blocks(model.base, ids, blocks)
        assert tensor.shape == wanted.shape
        assert np.abs(decode_floats(tensor) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("send", ["embeddings", "token-ids"])
@pytest.mark.parametrize(("wire_dtype", "tolerance"), [("fp32", 1e-5), ("fp16", 2e-3), ("int8", 3e-2)])
def test_what_comes_is_what_the_blocks_give(model: Tiny, wire_dtype: str, tolerance: float, send: str) -> None:
    given = texts(model.base.vocabulary_size)
    with serving(model.base, window=3) as server, encoder(server.url, model, wire_dtype, send) as ask:
        check(model, encode(ask, given), given, tolerance)
        assert list(ask.encode([])) == []


def test_texts_in_any_company_differ_by_rounding_only(model: Tiny) -> None:
    """Together, in another order, cut otherwise, or alone."""
    given = texts(model.base.vocabulary_size)
    with serving(model.base) as server, encoder(server.url, model) as ask:
        check(model, encode(ask, given), given, 1e-5)
        check(model, encode(ask, given[::-1])[::-1], given, 1e-5)
    with serving(model.base, window=2, max_tokens=12) as server, encoder(server.url, model) as ask:
        check(model, encode(ask, given), given, 1e-5)
        check(model, [encode(ask, [ids])[0] for ids in given], given, 1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "opt", "gemma3_text", "mamba"])
def test_in_other_families(tiny: TinyFactory, family: str) -> None:
    """Also in those that run a row a sequence, and that have another width in the middle."""
    model = tiny(family=family, head_dtype="fp32")
    width = after_blocks(model.base, texts(model.base.vocabulary_size)[0], 1).shape[1]
    given = texts(model.base.vocabulary_size)
    with serving(model.base) as server, encoder(server.url, model, width=width) as ask:
        check(model, encode(ask, given), given, 1e-5)


def test_blocks_that_a_server_does_not_have_are_refused(model: Tiny) -> None:
    blocks, width = model.base.blocks, model.base.hidden_size
    with serving(model.base) as server:
        for purpose in ({"blocks": blocks + 1}, {"width": width + 1}, {"blocks": 1 << 20}):
            with (
                pytest.raises(RefusedError, match=r"first blocks of .* give hidden states of width"),
                encoder(server.url, model, **purpose),
            ):
                pass
        with encoder(server.url, model) as ask, pytest.raises(DataError, match="set --max-length"):
            encode(ask, [np.zeros(model.base.max_sequence_length + 1, np.int64)])


def test_a_lost_session_costs_what_had_not_come(model: Tiny) -> None:
    given = texts(model.base.vocabulary_size, lengths=(3,) * 40)
    with serving(model.base, max_tokens=6, window=2) as server, encoder(server.url, model) as ask:
        whole = encode(ask, given)
        found = []
        for index, tensors in enumerate(ask.encode([given[start : start + 2] for start in range(0, 40, 2)])):
            found += tensors
            if index in (3, 12):
                for live in server.server.service.sessions:
                    server.server.service.sessions._evict(live, "a test")
        assert found == whole
        assert ask.connection.reconnects == 2
