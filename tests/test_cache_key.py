"""A cache that a user's key encrypts: nothing of a text without the key, and the bits of a run that has none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import run_edge
from runs import settings_in
from serving import serving
from test_resume import STEPS, Place, assert_same_run
from test_trunk_command import NOWHERE, TRUNK, records, summary
from tiny import Tiny, TinyFactory

from dlora.edge.model.cache_key import CacheKey
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache
from dlora.edge.run.directory import CACHE
from dlora.protocol.errors import CheckpointError
from dlora.protocol.wire_codecs import encode_floats

SECRET, OTHER = bytes(range(32)), bytes(range(1, 33))
OWNER = CacheOwner(base_model="0" * 64, blocks=2, width=8, embeddings="fp16 as fp16", codec="fp16")
TEXTS = [np.arange(3, 8), np.arange(5, 12), np.arange(2)]
RANDOM = np.random.default_rng(0)
TENSORS = [encode_floats(RANDOM.normal(size=(len(ids), 8)).astype(np.float32), "fp16") for ids in TEXTS]


def filled(path: Path, key: CacheKey | None) -> list[bytes]:
    """A file with all texts; what they are called."""
    cache = TrunkCache(path, OWNER, limit=1 << 20, key=key)
    digests = [cache.digest(ids) for ids in TEXTS]
    assert all(cache.add(digest, tensor) for digest, tensor in zip(digests, TENSORS, strict=True))
    cache.close()
    return digests


def test_a_file_says_nothing_without_its_key(tmp_path: Path) -> None:
    key = CacheKey(SECRET)
    plain, sealed = filled(tmp_path / "plain", None), filled(tmp_path / "sealed", key)
    assert set(plain).isdisjoint(sealed)
    content = (tmp_path / "sealed").read_bytes()
    for digest, tensor in zip(plain, TENSORS, strict=True):
        assert digest not in content
        assert tensor.data.tobytes()[:16] not in content
    assert SECRET not in content
    again = TrunkCache(tmp_path / "sealed", OWNER, limit=1 << 20, key=CacheKey(SECRET))
    for digest, tensor in zip(sealed, TENSORS, strict=True):
        found = again.get(digest, tensor.shape[0])
        assert found is not None
        assert found.data.tobytes() == tensor.data.tobytes()
        assert found.exponent == tensor.exponent
    again.close()


@pytest.mark.parametrize(("made_with", "opened_with", "said"), [
    (SECRET, OTHER, "is encrypted with another key; give its --cache-key-file, or remove the file"),
    (SECRET, None, "is encrypted; give its --cache-key-file, or remove the file"),
    (None, SECRET, "is not encrypted; leave out --cache-key-file, or remove the file"),
])  # fmt: skip
def test_another_key_is_one_line(made_with: bytes | None, opened_with: bytes | None, said: str, tmp_path: Path) -> None:
    made, opened = (None if secret is None else CacheKey(secret) for secret in (made_with, opened_with))
    filled(tmp_path / "cache", made)
    with pytest.raises(CheckpointError, match=said):
        TrunkCache(tmp_path / "cache", OWNER, limit=1 << 20, key=opened)


def test_a_record_that_was_put_elsewhere_is_not_taken(tmp_path: Path) -> None:
    """What is encrypted is bound to its text: another record's content, with a check that fits, is no text."""
    key = CacheKey(SECRET)
    about, content = b"head of one", key.seal(b"content", b"head of one")
    assert key.open(content, about) == b"content"
    assert key.open(content, b"head of another") is None
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        assert key.open(bytes(changed), about) is None
    assert key.seal(b"content", about) != content


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    model: Tiny = tiny(blocks=4, device_blocks=3, head_dtype="fp32")
    data = tmp_path_factory.mktemp("key") / "data.jsonl"
    data.write_text(records(6))
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


def test_a_run_with_a_key_has_the_bits_of_one_without(place: Place, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_text(SECRET.hex() + "\n")
    for name, options in (("plain", ()), ("sealed", ("--cache-key-file", key))):
        summary(run_edge(*place.train(tmp_path / name, *TRUNK, "--keep-cache", *options, "--json")))
    assert_same_run(tmp_path / "sealed", tmp_path / "plain")
    assert settings_in(tmp_path / "sealed").cache_key_file == key
    assert (tmp_path / "sealed" / CACHE).stat().st_size > (tmp_path / "plain" / CACHE).stat().st_size
    longer = summary(run_edge("resume", tmp_path / "sealed", "--steps", STEPS + 5, "--server", NOWHERE, "--json"))
    begun = json.loads((tmp_path / "plain" / "summary.json").read_text())
    assert longer["bytes_up"] == longer["set_up_bytes_up"] == begun["set_up_bytes_up"], "nothing more crossed"
    key.chmod(0o644)
    done = run_edge("resume", tmp_path / "plain", "--steps", STEPS + 5, "--cache-key-file", key, "--server", NOWHERE)
    assert done.code == 10
    assert "is not encrypted" in done.stderr
    assert "can be read by others; run: chmod 600" in done.stderr


@pytest.mark.parametrize("content", [None, "", "secret", "0" * 63, "0" * 66])
def test_a_key_that_is_none_is_one_line(place: Place, content: str | None, tmp_path: Path) -> None:
    key = tmp_path / "key"
    if content is not None:
        key.write_text(content)
    done = run_edge(*place.train(tmp_path / "out", *TRUNK, "--cache-key-file", key))
    assert done.code == 2
    no_key = "does not hold 64 hexadecimal digits; make one: openssl rand -hex 32"
    assert ("cannot be read" if content is None else no_key) in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
