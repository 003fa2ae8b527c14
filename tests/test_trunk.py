"""Training in ``trunk``: what torch and PEFT do, without a server once its answers are there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from peft_reference import assert_steps_are_those_of_peft, loss_of, with_adapters
from serving import random_dataset, randomize, serving
from tiny import Tiny, TinyFactory
from transformers import AutoModelForCausalLM
from trunk_runs import trunk_config, trunk_training
from waiting import eventually

from dlora.edge.data.batches import pack
from dlora.edge.data.examples import Dataset
from dlora.edge.model.cached_source import texts_of
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache, most_bytes, record_bytes, text_digest
from dlora.edge.wire.connection import Connection
from dlora.protocol.choices import Send
from dlora.protocol.manifest import load_manifest
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import Codecs, encode_floats

BLOCKS = (1, 2)


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(blocks=3, device_blocks=3, head_dtype="fp32")


@pytest.fixture(scope="module")
def data(model: Tiny) -> Dataset:
    return random_dataset(model.base.vocabulary_size)


def test_a_step_is_that_of_peft(model: Tiny, data: Dataset, tmp_path: Path) -> None:
    """Losses and gradients of the first step, and the weights after some, of LoRA on every linear module."""
    with (
        serving(model.base) as server,
        trunk_training(model.bundle, server.url, trunk_config(BLOCKS), data, tmp_path / "cache") as trainer,
    ):
        randomize(trainer)
        reference = with_adapters(AutoModelForCausalLM.from_pretrained(model.model), trainer.adapters, 4, 8.0)
        assert len(trainer.adapters.parameters()) == 2 * 2 * 7
        assert_steps_are_those_of_peft(trainer, reference, 6)
        found = trainer.evaluate(data)
        assert abs(found.loss - loss_of(reference, [pack([data[index] for index in range(len(data))])]).item()) < 1e-4


def test_once_the_cache_is_full_no_server_is_needed(model: Tiny, data: Dataset, tmp_path: Path) -> None:
    """The server is gone for good; another process would do as this does, which finds the cache."""
    with serving(model.base) as server:
        url = server.url
        with trunk_training(model.bundle, url, trunk_config(BLOCKS), data, tmp_path / "cache") as trainer:
            eventually(lambda: len(server.server.service.sessions) == 0)
            up, down = trainer.traffic
    assert up > 0
    assert down > 0
    with trunk_training(model.bundle, url, trunk_config(BLOCKS), data, tmp_path / "cache") as trainer:
        trainer.run_step()
        assert trainer.traffic == (0, 0)
        # What it says of an earlier process's traffic; the rest is greetings.
        assert 0.8 * (up + down) < trainer.model._source.kept_bytes < up + down


def test_what_does_not_fit_is_asked_for_each_time(model: Tiny, data: Dataset, tmp_path: Path) -> None:
    """Alone, no more in its pack, so that it is the same but for rounding."""
    finals = []
    run = trunk_config(BLOCKS)
    with serving(model.base) as server:
        for limit in (1 << 30, 1500, 1500, 0):
            path = tmp_path / str(len(finals))
            with trunk_training(model.bundle, server.url, run, data, path, limit=limit) as trainer:
                before = trainer.traffic
                finals.append([trainer.run_step().loss for _ in range(6)])
                assert (trainer.traffic == before) is (limit == 1 << 30)
                assert path.stat().st_size <= max(limit, 300)
    assert finals[1] == finals[2]
    assert np.allclose(finals[1:], finals[0], rtol=1e-5)


def test_a_text_in_packs_has_the_same_bits_again(model: Tiny, data: Dataset, tmp_path: Path) -> None:
    """Filled at once, in two goes, or after a record was damaged: its whole pack is asked for again."""
    run, finals = trunk_config(BLOCKS), []
    with serving(model.base) as server:
        for name in ("whole", "cut off", "damaged"):
            path = tmp_path / name
            with trunk_training(model.bundle, server.url, run, data, path) as trainer:
                if name == "whole":
                    finals.append([trainer.run_step().loss for _ in range(6)])
                    continue
            content = bytearray(path.read_bytes())
            if name == "cut off":
                path.write_bytes(content[:-100])
            else:
                content[-20] ^= 1
                path.write_bytes(content)
            with trunk_training(model.bundle, server.url, run, data, path) as trainer:
                finals.append([trainer.run_step().loss for _ in range(6)])
    assert finals[0] == finals[1] == finals[2]


def test_what_is_sent_depends_on_the_text_alone(model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels, adapters, AdamW's state and the seed are others: the bytes on the wire are the same."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, model.base.vocabulary_size, length).tolist() for length in (5, 7, 4, 6)]
    sent: list[list[bytes]] = []
    write = Connection._write
    monkeypatch.setattr(Connection, "_write", lambda self, frame: (sent[-1].append(bytes(frame)), write(self, frame)))
    with serving(model.base, window=1) as server:
        for trial in range(3):
            rng = np.random.default_rng(trial)
            data = Dataset.of([(ids, [*rng.choice(len(ids) - 2, 2, replace=False), len(ids) - 2]) for ids in texts])
            run = trunk_config(BLOCKS, seed=(trial,), rank=4 + trial, optimizer={"lr": 10.0**-trial})
            sent.append([])
            with trunk_training(model.bundle, server.url, run, data, tmp_path / str(trial), fill=False) as trainer:
                randomize(trainer, seed=trial)
                trainer.model._source.fill(texts_of(data))
                for _ in range(3):
                    trainer.run_step()
    assert sent[0] == sent[1] == sent[2]
    assert len(sent[0]) >= 3


def owner(width: int, codec: str) -> CacheOwner:
    return CacheOwner(base_model="a", blocks=1, width=width, embeddings="fp16 as fp16", codec=codec)


def test_a_cache_is_of_texts_as_they_were_sent(tiny: TinyFactory) -> None:
    manifest = load_manifest(tiny(head_dtype="fp32").bundle)

    def made(codecs: str, send: Send) -> str:
        return CacheOwner.of(manifest, 1, 16, Codecs.parse(codecs), send).embeddings

    assert made("fp16", "embeddings") != made("fp16,embeddings=int8", "embeddings")
    assert made("fp16", "token-ids") == made("fp16,embeddings=int8", "token-ids") == "token-ids"


def filled(path: Path, width: int, codec: str) -> tuple[list[np.ndarray], list[WireTensor], TrunkCache]:
    """Texts, their hidden states, and a cache that was closed with them in it."""
    texts = [np.arange(length) for length in (3, 5, 2, 4)]
    tensors = [encode_floats(np.full((len(ids), width), len(ids), np.float32), codec) for ids in texts]
    cache = TrunkCache(path, owner(width, codec), limit=1 << 20)
    assert all(cache.add(text_digest(ids), tensor) for ids, tensor in zip(texts, tensors, strict=True))
    cache.close()
    return texts, tensors, cache


def test_a_cache_grows_no_larger_than_its_limit_and_shrinks_to_another(tmp_path: Path) -> None:
    texts, tensors, cache = filled(tmp_path / "cache", 4, "fp16")
    size = cache.nbytes
    assert (tmp_path / "cache").stat().st_size == size
    heads_and_tensors = sum(record_bytes("fp16", len(ids), 4, is_sealed=True) for ids in texts)
    assert most_bytes(len(texts), sum(map(len, texts)), 4, "fp16") - most_bytes(0, 0, 4, "fp16") == heads_and_tensors
    assert most_bytes(0, 0, 4, "fp16") >= size - sum(cache.record_bytes(len(ids)) for ids in texts)
    smaller = TrunkCache(tmp_path / "cache", owner(4, "fp16"), limit=size - 1)
    assert [smaller.get(text_digest(ids), len(ids)) for ids in texts] == [*tensors[:3], None]
    assert not smaller.add(text_digest(texts[3]), tensors[3])
    smaller.close()
    (tmp_path / "cache").write_bytes(bytes(size))  # what a power cut may leave
    empty = TrunkCache(tmp_path / "cache", owner(4, "fp16"), limit=size)
    assert len(empty) == 0
    assert empty.add(text_digest(texts[0]), tensors[0])
    empty.close()


def test_one_damaged_record_is_one_text(tmp_path: Path) -> None:
    """Whichever byte it is: all others are found."""
    path = tmp_path / "cache"
    texts, tensors, cache = filled(path, 2, "fp32")
    content = path.read_bytes()
    sizes = [cache.record_bytes(len(ids)) for ids in texts]
    ends = np.cumsum([len(content) - sum(sizes), *sizes])
    for place in range(ends[1], ends[2]):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        damaged = TrunkCache(path, owner(2, "fp32"), limit=1 << 20)
        assert [damaged.get(text_digest(ids), len(ids)) for ids in texts] == [tensors[0], None, *tensors[2:]], place
        damaged.close()
