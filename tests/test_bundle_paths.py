"""A bundle comes from somebody else: no path of its manifest leads to a file that is not its own.

What a tokenizer or a chat template is read from may become a prompt, and a server reads prompts back from embeddings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from block_bundles import block_bundle
from processes import run_edge
from tiny import TinyFactory

from dlora.edge.commands.description import describe
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.onnx_engine import OnnxEngine
from dlora.protocol import manifest as schema
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import BundlePath, Manifest, load_manifest

SECRET = b"the device's own secret"
DOCS = (Path(__file__).parents[1] / "docs" / "reference" / "bundle.md").read_text()

Place = tuple[str, ...]
"""Where a path stands in a manifest: names of fields, ``[]`` for an item, ``{}`` for a value, ``keys`` for a key."""


def path_fields(kind: Any, place: Place = ()) -> Iterator[Place]:
    """Every place of the schema that holds a path, found in its annotations."""
    if kind == BundlePath:
        yield place
        return
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            yield from path_fields(hint, (*place, name))
        return
    arguments = typing.get_args(kind)
    match typing.get_origin(kind):
        case typing.Annotated:
            yield from path_fields(arguments[0], place)
        case origin if origin is tuple:
            yield from path_fields(arguments[0], (*place, "[]"))
        case origin if origin is dict:
            yield from path_fields(arguments[0], (*place, "keys"))
            yield from path_fields(arguments[1], (*place, "{}"))
        case _:
            for argument in arguments:
                yield from path_fields(argument, place)


FIELDS = list(path_fields(Manifest))


def put(value: Any, place: Place, path: str) -> None:
    """Write ``path`` into a manifest's JSON at ``place``; of several items or values, into the last; add a key."""
    step, *rest = place
    if step == "keys":
        value[path] = value[list(value)[-1]]
        return
    key = list(value)[-1] if step == "{}" else len(value) - 1 if step == "[]" else step
    if rest:
        if value[key] is None:  # a table that this bundle has not
            value[key] = {"axis": 0}
        put(value[key], tuple(rest), path)
    else:
        value[key] = path


@pytest.fixture(scope="module")
def original(tiny: TinyFactory) -> Path:
    """With all that a bundle may have."""
    return block_bundle(tiny)


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy, beside a file that is not its own."""
    shutil.copytree(original, tmp_path / "bundle")
    (tmp_path / "secret").write_bytes(SECRET)
    return tmp_path / "bundle"


OUTSIDE = {
    "up": "../secret",
    "down and up": "weights/../../secret",
    "absolute": "",  # which the fixture knows
    "link": "link",
    "link to a folder": "weights/up/secret",
    "link in a circle": "circle",
    "backslashes": "..\\secret",
    "nul": "weights/\0",
    "empty": "",
    "itself": ".",
    "by another name": "./weights/embedding.npy",
}


def write(bundle: Path, place: Place, path: str, *, listed: bool) -> None:
    """Change the manifest; ``listed`` with the right size and digest, as whoever makes such a bundle would."""
    value = json.loads((bundle / "manifest.json").read_text())
    put(value, place, path)
    if listed:
        value["files"][path] = {"bytes": len(SECRET), "sha256": hashlib.sha256(SECRET).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(value))


def refused(bundle: Path, text: str) -> None:
    """By whatever reads a manifest."""
    for reads in (load_manifest, describe, Bundle.open):
        with pytest.raises(BundleError, match=text) as caught:
            reads(bundle)
        assert str(SECRET) not in str(caught.value)


def test_path_fields_are_those_of_the_docs() -> None:
    documented = set()
    for struct, table in re.findall(r"^### `(\w+)`\n(.*?)(?=^#|\Z)", DOCS, re.MULTILINE | re.DOTALL):
        for field, kind in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", table, re.MULTILINE):
            documented |= {(struct, field)} if re.search(r"\bpath\b", kind) else set()
    found = set()
    for struct in vars(schema).values():
        if isinstance(struct, type) and issubclass(struct, msgspec.Struct):
            for name, hint in typing.get_type_hints(struct, include_extras=True).items():
                inner = {step for place in path_fields(hint) for step in place} <= {"keys", "{}"}
                found |= {(struct.__name__, name)} if inner and any(True for _ in path_fields(hint)) else set()
    assert found == documented
    assert len(documented) == 15
    assert len(FIELDS) == 16  # a table may stand in two places


@pytest.mark.parametrize("way", OUTSIDE)
def test_path_outside_the_bundle_is_refused(bundle: Path, way: str) -> None:
    (bundle / "link").symlink_to(bundle.parent / "secret")
    (bundle / "weights" / "up").symlink_to("../..")
    (bundle / "circle").symlink_to("circle")
    path = str(bundle.parent / "secret") if way == "absolute" else OUTSIDE[way]
    manifest = (bundle / "manifest.json").read_bytes()
    for place in FIELDS:
        (bundle / "manifest.json").write_bytes(manifest)
        write(bundle, place, path, listed=True)
        refused(bundle, "names a file outside the bundle")


def test_path_that_is_not_in_files_is_refused(bundle: Path) -> None:
    (bundle / "unlisted").write_bytes(SECRET)
    manifest = (bundle / "manifest.json").read_bytes()
    for place in FIELDS:
        if place != ("files", "keys"):
            (bundle / "manifest.json").write_bytes(manifest)
            write(bundle, place, "unlisted", listed=False)
            refused(bundle, "which its files do not list")


def test_links_inside_a_bundle_are_allowed(bundle: Path) -> None:
    """As some stores of files keep them. A bundle that is a link itself, or lies under one, is none of ours either."""
    (bundle / "tokenizer" / "tokenizer.json").rename(bundle / "blob")
    (bundle / "tokenizer" / "tokenizer.json").symlink_to("../blob")
    (bundle.parent / "name").symlink_to(bundle)
    assert EdgeTokenizer.open(Bundle.open(bundle.parent / "name")).longest_token_bytes() > 0


@pytest.mark.parametrize("command", ["info", "selftest", "doctor", "train", "evaluate", "generate"])
def test_every_command_refuses_an_outside_path_in_one_line(bundle: Path, command: str, tmp_path: Path) -> None:
    write(bundle, ("tokenizer", "chat_template"), "../secret", listed=True)
    (tmp_path / "data.jsonl").write_text('{"text": "w1 w2"}\n')
    nobody = ["--server", "ws://127.0.0.1:9"]
    more = {
        "info": [bundle],
        "selftest": ["--bundle", bundle],
        "doctor": ["--bundle", bundle],
        "train": ["--bundle", bundle, *nobody, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out"],
        "evaluate": ["--bundle", bundle, *nobody, "--data", tmp_path / "data.jsonl"],
        "generate": ["--bundle", bundle, *nobody, "--prompt", "w1"],
    }[command]
    done = run_edge(command, *more)
    said = done.stdout + done.stderr
    assert "tokenizer.chat_template names a file outside the bundle: '../secret'" in " ".join(said.split())
    assert "Traceback" not in said
    if command == "doctor":  # which goes on to the next check
        assert done.code == 1
    else:
        assert (done.code, len(done.errors)) == (BundleError.exit_code, 1), said


@pytest.mark.parametrize("where", ["absolute", "up", "link"])
def test_graph_with_external_data_is_refused(bundle: Path, where: str) -> None:
    """Digests are right, and ONNX Runtime before 1.24 reads it: the delta, which is sent, would hold the secret."""
    opened = Bundle.open(bundle)
    spec = next(graph for graph in opened.manifest.graphs if graph.kind == "adapter_forward")
    name = spec.files["onnx"]
    tensor = onnx.TensorProto(name="secret", data_type=onnx.TensorProto.UINT8, dims=[len(SECRET)])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    if where == "link":
        (bundle / name).with_name("weights.bin").symlink_to(bundle.parent / "secret")
    location = {"absolute": str(bundle.parent / "secret"), "up": "../../secret", "link": "weights.bin"}[where]
    tensor.external_data.add(key="location", value=location)
    model = onnx.load(bundle / name, load_external_data=False)
    model.graph.initializer.append(tensor)
    (bundle / name).write_bytes(model.SerializeToString())
    value = json.loads((bundle / "manifest.json").read_text())
    content = (bundle / name).read_bytes()
    value["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(BundleError, match="takes data from another file"):
        OnnxEngine(Bundle.open(bundle)).load(spec.kind, spec.key)


@pytest.mark.parametrize(("kind", "words"), [
    ("pipe", "is no regular file"), ("folder", "is no regular file"),
    ("link", "is a link to a file outside the bundle"), ("endless", "is a link to a file outside the bundle"),
])  # fmt: skip
def test_manifest_that_is_no_file_of_the_bundle_is_refused(bundle: Path, kind: str, words: str) -> None:
    manifest = bundle / "manifest.json"
    manifest.rename(bundle.parent / "elsewhere.json")
    if kind == "pipe":
        os.mkfifo(manifest)
    elif kind == "folder":
        manifest.mkdir()
    else:
        manifest.symlink_to("/dev/zero" if kind == "endless" else bundle.parent / "elsewhere.json")
    refused(bundle, words)


@pytest.mark.parametrize(("change", "words"), [
    (lambda it: it.update(groups=[]), "groups"),
    (lambda it: it["defaults"].update(r=10**9), r"defaults\.r"),
    (lambda it: it["groups"][0].update(targets=[]), "an exchange group has no target module"),
    (lambda it: it.update(order=[0, 1, 2]), "its order is not one of its 14 modules"),
    (lambda it: it.update(order=[0] * 14), "its order is not one of its 14 modules"),
    (lambda it: it["graphs"][0].update(outputs=[]), "outputs"),
    *((lambda it, kind=kind: it["graphs"][0].update(kind=kind), "kind") for kind in ("", "../adamw", "a\n", "x" * 65)),
    (lambda it: it["graphs"][0].update(outputs=it["graphs"][0]["outputs"] * 2), "names an output twice"),
], ids=["no groups", "rank", "no targets", "half an order", "no order", "no outputs",
        "no kind", "a path as kind", "lines as kind", "long kind", "outputs twice"])  # fmt: skip
def test_inconsistent_manifest_is_refused(bundle: Path, change: Any, words: str) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    refused(bundle, words)


def test_a_bundle_that_is_a_link_to_itself_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(tmp_path / "bundle")
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read \(.*links.*\); export the bundle again$"):
        load_manifest(tmp_path / "bundle")
