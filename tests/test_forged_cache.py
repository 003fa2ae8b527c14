"""A cache of hidden states that somebody else has made: what it says is checked as a server's answer is, and what lies
in its place is left alone unless it is a file of ours."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dlora.edge.files import write_atomically
from dlora.edge.model.trunk_cache import CacheOwner, TrunkCache, text_digest
from dlora.protocol.errors import CheckpointError, StorageError
from dlora.protocol.tensors import MAX_EXPONENT, WireTensor
from dlora.protocol.wire_codecs import encode_floats

TEXTS = [np.arange(3), np.arange(5), np.arange(2)]
NAN16, INFINITY32 = np.array([0x7E00], np.uint16).view(np.float16), np.array([np.inf], np.float32)


def owner(codec: str) -> CacheOwner:
    return CacheOwner(base_model="a", blocks=1, width=2, embeddings="fp16 as fp16", codec=codec)


def honest(codec: str) -> list[WireTensor]:
    rng = np.random.default_rng(0)
    return [encode_floats(rng.normal(size=(len(ids), 2)).astype(np.float32) * 1e-6, codec) for ids in TEXTS]


def kept(path: Path, codec: str, tensors: list[WireTensor]) -> None:
    """A file with right checks, whatever is in it: they need no secret."""
    cache = TrunkCache(path, owner(codec), limit=1 << 20)
    assert all(cache.add(text_digest(ids), tensor) for ids, tensor in zip(TEXTS, tensors, strict=True))
    cache.close()


FORGED = {
    "exponent too large": ("fp16", lambda real: WireTensor("fp16", real.data, 2**31 - 1)),
    "exponent too small": ("fp16", lambda real: WireTensor("fp16", real.data, -(2**31))),
    "one more": ("fp16", lambda real: WireTensor("fp16", real.data, MAX_EXPONENT + 1)),
    "one less": ("fp16", lambda real: WireTensor("fp16", real.data, -MAX_EXPONENT - 1)),
    "exponent that becomes infinity": ("fp16", lambda real: WireTensor("fp16", real.data * 0 + 60000, MAX_EXPONENT)),
    "NaN in fp16": ("fp16", lambda real: WireTensor("fp16", np.where([True, False], NAN16, real.data))),
    "infinity in fp32": ("fp32", lambda real: WireTensor("fp32", np.where([True, False], INFINITY32, real.data))),
    "exponent of fp32": ("fp32", lambda real: WireTensor("fp32", real.data, 1)),
    "exponent of int8": ("int8", lambda real: WireTensor("int8", real.data, 1)),
    "scale of int8": ("int8", lambda real: WireTensor("int8", np.full_like(real.data, 0x7F))),
    "a token more": ("fp16", lambda real: WireTensor("fp16", np.concatenate([real.data, real.data[:1]]), 1)),
    "a token less": ("fp32", lambda real: WireTensor("fp32", real.data[1:])),
}


def read_again(path: Path, codec: str, wanted: list[WireTensor | None], add: WireTensor | None = None) -> list[str]:
    """What is said of a file that has ``wanted``; it is then given ``add`` for its second text."""
    said: list[str] = []
    cache = TrunkCache(path, owner(codec), limit=1 << 20, warn=said.append)
    assert [cache.get(text_digest(ids), len(ids)) for ids in TEXTS] == wanted
    assert add is None or cache.add(text_digest(TEXTS[1]), add)
    cache.close()
    return said


@pytest.mark.parametrize("name", FORGED)
def test_what_no_server_may_send_is_damaged(name: str, tmp_path: Path) -> None:
    codec, forge = FORGED[name]
    real, path = honest(codec), tmp_path / "cache"
    kept(path, codec, [real[0], forge(real[1]), real[2]])
    said = read_again(path, codec, [real[0], None, real[2]], add=real[1])
    assert said == [f"{path} is damaged in one place, whose text is asked for again"]
    assert read_again(path, codec, [*real]) == []


@pytest.mark.parametrize("codec", ["fp16", "fp32", "int8"])
def test_what_a_server_may_send_is_kept_bit_for_bit(codec: str, tmp_path: Path) -> None:
    """Also where it is far out: the largest exponent that the wire has, and the largest values."""
    real = honest(codec)
    if codec == "fp16":
        real[1] = WireTensor(codec, real[1].data * 0 + 1, MAX_EXPONENT)
        real[2] = WireTensor(codec, real[2].data, -MAX_EXPONENT)
    kept(tmp_path / "cache", codec, real)
    assert read_again(tmp_path / "cache", codec, [*real]) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("kind", "content"),
    [("link", b""), ("link", bytes(9)), ("link", b"dlora"), ("link", b"secret"), ("pipe", b""), ("nowhere", b"")],
)
def test_cache_that_is_no_file_of_its_own_is_refused_and_left_alone(tmp_path: Path, kind: str, content: bytes) -> None:
    victim, path = tmp_path / "victim", tmp_path / "out" / "trunk-cache.bin"
    victim.write_bytes(content)
    victim.chmod(0o644)
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path, 0o644)
    else:
        path.symlink_to(victim if kind == "link" else tmp_path / "new")
    before = path.lstat().st_mode
    with pytest.raises(StorageError, match=r"trunk-cache\.bin is no regular file"):
        TrunkCache(path, owner("fp16"), limit=1 << 20)
    assert victim.read_bytes() == content
    assert victim.stat().st_mode & 0o777 == 0o644
    assert path.lstat().st_mode == before
    assert not (tmp_path / "new").exists()


def test_file_that_is_no_cache_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    path.write_bytes(b"somebody's")
    path.chmod(0o644)
    with pytest.raises(CheckpointError, match="is no cache"):
        TrunkCache(path, owner("fp16"), limit=1 << 20)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"somebody's", 0o644)
    path.write_bytes(b"")
    TrunkCache(path, owner("fp16"), limit=1 << 20).close()
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["link", "pipe", "scrap"])
def test_whole_files_are_written_through_no_link(tmp_path: Path, kind: str) -> None:
    """The temporary file's name is known, so somebody may have put something there."""
    victim, temporary = tmp_path / "victim", tmp_path / ".run.json.tmp"
    victim.write_bytes(b"keep")
    if kind == "link":
        temporary.symlink_to(victim)
    elif kind == "pipe":
        os.mkfifo(temporary)
    else:
        temporary.write_bytes(b"what a killed process left")
    write_atomically(tmp_path / "run.json", b"new")
    assert (victim.read_bytes(), (tmp_path / "run.json").read_bytes()) == (b"keep", b"new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run.json", "victim"]
    assert not (tmp_path / "run.json").is_symlink()
