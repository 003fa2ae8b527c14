"""Fuzz target: a bundle that somebody made. An opened bundle, or ``BundleError``.

The input is the manifest and one weight file, joined. The mutator writes the weight file's digest into the
manifest, so that the reader gets to the file itself.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from random import Random

import msgspec
import numpy as np
from attacks.fuzz_target import Target, decode_json, encode_json, join, mutate_bytes, mutate_value, split

from dlora.edge.engine.bundle import Bundle
from dlora.protocol import manifest as schema
from dlora.protocol.errors import BundleError
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.version import BUNDLE_FORMAT

WEIGHT = "embedding.npy"


def target(directory: Path) -> Target:
    """The target; ``directory`` is its own."""
    (directory / "graph.onnx").write_bytes(b"graph")
    (directory / "tokenizer.json").write_bytes(b"{}")
    buffer = io.BytesIO()
    np.save(buffer, np.ones((5, 4), np.float16))
    weight = buffer.getvalue()
    manifest = manifest_of({"graph.onnx": b"graph", "tokenizer.json": b"{}", WEIGHT: weight})

    def run(data: bytes) -> None:
        for name, content in zip((schema.MANIFEST_NAME, WEIGHT), split(data), strict=True):
            (directory / name).write_bytes(content)
        try:
            bundle = Bundle.open(directory)
            bundle.golden_file()
            for graph in bundle.manifest.graphs:
                bundle.graph_file(graph.kind, graph.key, "onnx")
            for name in (bundle.manifest.embedding.weight, bundle.manifest.head.weight, *_of_blocks(bundle.manifest)):
                array = bundle.weight(name)
                assert type(array) is np.ndarray
                assert array.nbytes <= len(data)
        except BundleError:
            return

    return Target("manifest", (join(manifest, weight),), mutate, run)


def _of_blocks(manifest: schema.Manifest) -> list[str]:
    """The weight files of blocks, tables and final norm."""
    blocks = manifest.device_blocks
    if blocks is None:
        return []
    tables = [table.file for block in blocks.blocks for table in block.tables.values()]
    return [*tables, *(name for block in blocks.blocks for name in block.weights.values()), *blocks.final_norm.values()]


def mutate(data: bytes, rng: Random) -> bytes:
    """Change the manifest, or the weight file with its digest."""
    manifest, weight = split(data)
    try:
        value = decode_json(manifest)
        if rng.random() < 0.6:
            return join(encode_json(mutate_value(value, rng)), weight)
        weight = _mutated_array(weight, rng)
        value["files"][WEIGHT] = _described(weight)
        return join(msgspec.json.encode(value), weight)
    except (ValueError, KeyError, TypeError):
        return mutate_bytes(data, rng)


def _mutated_array(weight: bytes, rng: Random) -> bytes:
    """An ``.npy`` file with another dtype or shape in its header, or with other bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(weight, rng)
    dtype = rng.choice(("<f2", "<f4", "|O", "|S0", "|V4", "<U9", "<f9", "[('a','<f4')]", "|i1", "<m8[s]"))
    shape = tuple(rng.choice((0, 1, 4, 5, -1, 2**31, 2**62, 2**64)) for _ in range(rng.randrange(5)))
    header = f"{{'descr': {dtype!r}, 'fortran_order': {rng.random() < 0.5}, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + weight[128:]


def _described(content: bytes) -> dict[str, object]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def manifest_of(files: dict[str, bytes]) -> bytes:
    """A manifest as small as can be, of files with this content; the first is graph and golden vectors."""
    tensor = schema.TensorSpec("ids", "int64", ("tokens",))
    base = schema.BaseModelSpec(
        name="tiny",
        architecture="llama",
        weight_format="full",
        fingerprint="ab" * 32,
        blocks=1,
        embedding_size=4,
        hidden_size=4,
        vocabulary_size=5,
        max_sequence_length=8,
        parameters=99,
    )
    graph = schema.GraphSpec(
        kind="embedding", files={"onnx": "graph.onnx"}, inputs=(tensor,), outputs=(tensor,), error=0.0, tolerance=1e-5
    )
    table = schema.TableSpec(WEIGHT, 0)
    block = schema.BlockSpec(
        index=0, path="layers.0", graph="0", window=4, weights={"mlp.weight": WEIGHT}, tables={"cos": table}
    )
    return schema.encode_manifest(schema.Manifest(
        format=BUNDLE_FORMAT,
        software="dlora",
        base_model=base,
        defaults=schema.AdapterDefaults(2, 8.0, ("q_proj",)),
        groups=(GroupSpec(0, 4, (TargetSpec("layers.0.q_proj", 4),)),),
        embedding=schema.EmbeddingSpec(WEIGHT, "fp16"),
        head=schema.HeadSpec(weight=WEIGHT, dtype="fp16", tied=True),
        tokenizer=schema.TokenizerSpec(file="tokenizer.json"),
        graphs=(graph,),
        golden="graph.onnx",
        files={name: schema.FileSpec(**_described(content)) for name, content in files.items()},  # type: ignore[arg-type]
        device_blocks=schema.DeviceBlocksSpec(
            dtype="fp16", max_length=8, blocks=(block,), final_norm={"0.weight": WEIGHT},
            entry=schema.EntrySpec(2.0, table),
        ),
    ))  # fmt: skip
