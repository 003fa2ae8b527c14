"""The bundle's manifest: what ``dlora-export`` writes and ``dlora-edge`` reads. docs/reference/bundle.md is normative.

A bundle is a directory; ``manifest.json`` names every other file in it with its size and SHA-256. Paths are
relative, with ``/``, stand in ``files`` and never leave the bundle: a bundle comes from somebody else, and what its
tokenizer or template is read from may end up on the wire. ``load_manifest`` refuses the whole bundle otherwise, so that
no path of a manifest that was loaded needs another look; a field that holds one is a ``BundlePath``.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import msgspec.inspect

from .bundle_paths import lies_inside, paths_in
from .choices import WeightFormat
from .errors import BundleError
from .groups import GroupSpec
from .limits import MAX_RANK
from .structure_words import structure_words
from .version import BUNDLE_FORMAT

MANIFEST_NAME: Final = "manifest.json"
MAX_MANIFEST_BYTES: Final = 16 << 20

StoredDtype = Literal["fp32", "fp16", "int8", "int4"]
# Open: a bundle may have graphs of kinds that a device neither knows nor needs.
GraphKind = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9_]*\Z", max_length=64)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
BundlePath = Annotated[str, msgspec.Meta(extra={"path": True})]


class FileSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size in bytes and hex SHA-256 of one file of the bundle."""

    bytes: Annotated[int, msgspec.Meta(ge=0)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class BaseModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The frozen pretrained model that the bundle belongs to.

    Attributes:
        name: what adapters call it: its hub id where that is known, else as the user named it.
        architecture: Hugging Face ``model_type``.
        fingerprint: hex SHA-256 over the names, shapes and bfloat16 values of all parameters; a server that
            loads the model in float32 or bfloat16 computes the same.
        embedding_size: width of ``inputs_embeds``; hidden_size: of ``last_hidden_state``.
        parameters: how many, tied ones once.
        weight_format: how the server holds those of the linear modules: the bundle is of what they are then.
    """

    name: str
    architecture: str
    weight_format: WeightFormat
    fingerprint: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    blocks: Positive
    embedding_size: Positive
    hidden_size: Positive
    vocabulary_size: Positive
    max_sequence_length: Positive
    parameters: Positive


class AdapterDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a run's adapters are where it says nothing else, in PEFT's words."""

    r: Annotated[int, msgspec.Meta(ge=1, le=MAX_RANK)]
    lora_alpha: Annotated[float, msgspec.Meta(gt=0)]
    target_modules: tuple[str, ...]


class EmbeddingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The token embedding: ``weight``, (vocabulary, embedding_size), times ``scale``. Files are as in ``HeadSpec``."""

    weight: BundlePath
    dtype: StoredDtype
    scale: float = 1.0
    row_scales: BundlePath | None = None
    group_scales: BundlePath | None = None

    @property
    def weight_files(self) -> dict[str, str]:
        """Graph input to ``.npy`` file."""
        return _weight_files(self)


class HeadSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The LM head: ``logits = cap(logit_scale * (h W^T + bias))``, ``cap(x) = softcap * tanh(x / softcap)``.

    Attributes:
        weight: ``.npy`` file, (vocabulary, hidden_size); the embedding's own file where tied and of one dtype. Of
            ``int4`` (vocabulary, groups, bytes): two numbers a byte, docs/reference/bundle.md.
        row_scales: ``.npy`` fp32 (vocabulary,), only for ``int8``: ``W = weight * row_scales[:, None]``.
        group_scales: ``.npy`` fp16 (vocabulary, groups, 1), only for ``int4``.
        bias: ``.npy`` fp32 (vocabulary,).
        rows: labelled rows per call of a head graph that use memory well; callers loop over chunks of it.
    """

    weight: BundlePath
    dtype: StoredDtype
    tied: bool
    row_scales: BundlePath | None = None
    group_scales: BundlePath | None = None
    bias: BundlePath | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    rows: Positive = 32

    @property
    def weight_files(self) -> dict[str, str]:
        """Graph input to ``.npy`` file."""
        return _weight_files(self) | ({} if self.bias is None else {"bias": self.bias})


def _weight_files(spec: EmbeddingSpec | HeadSpec) -> dict[str, str]:
    files = {"weight": spec.weight, "row_scales": spec.row_scales, "group_scales": spec.group_scales}
    return {name: file for name, file in files.items() if file is not None}


class TokenizerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``tokenizer.json`` of the tokenizers library, a Jinja file, and what else chat templates need."""

    file: BundlePath
    chat_template: BundlePath | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()

    @property
    def all_stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: ``eos_token_id`` and what ``stop_token_ids`` has besides."""
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        return tuple(dict.fromkeys((*self.stop_token_ids, *eos)))


class TableSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What blocks are given for each position: ``.npy`` fp32, with a row for each along ``axis``."""

    file: BundlePath
    axis: Annotated[int, msgspec.Meta(ge=0, le=7)]


class BlockSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One block that a device can run.

    Attributes:
        path: its name in the base model, which those of its modules begin with; graph: the key of its graphs.
        window: how many tokens its attention sees at most, the token itself among them; None: all before it.
        weights: graph input to ``.npy`` file; tables: likewise, of what depends on positions.
    """

    index: Annotated[int, msgspec.Meta(ge=0, le=2**16)]
    path: str
    graph: str
    window: Positive | None = None
    weights: dict[str, BundlePath]
    tables: dict[str, TableSpec] = {}


class EntrySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the base model does between its embeddings and block 0: ``x = scale * embedding + positions[position]``.

    ``positions``: ``.npy`` fp32, a row of block 0's width for each position along ``axis`` 0; None: nothing is added.
    """

    scale: float = 1.0
    positions: TableSpec | None = None


class DeviceBlocksSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The last blocks of the base model, for a device that runs some of them itself.

    Attributes:
        dtype: of the weights of linear modules; int8 also where it is int4, of those whose rows have no groups.
        max_length: the most tokens of a sequence.
        blocks: in the order of execution, up to the last of the base model; entry: what stands before block 0, where
            that is among them; final_norm: what stands after them, graph input to ``.npy`` file.
        without_decode: why they have no graphs to go on from earlier tokens with, in words; None where they have.
    """

    dtype: StoredDtype
    max_length: Positive
    blocks: Annotated[tuple[BlockSpec, ...], msgspec.Meta(min_length=1)]
    final_norm: dict[str, BundlePath]
    entry: EntrySpec = EntrySpec()
    without_decode: str | None = None


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph's input or output. Strings in ``shape`` are dynamic dimensions, ``tokens`` and so on:
    docs/reference/bundle.md."""

    name: str
    dtype: Literal["fp32", "fp16", "int8", "int64"]
    shape: tuple[int | str, ...]


class GraphSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One graph: where it is, what goes in and out, and how far it was from torch when exported.

    Attributes:
        key: widths that tell graphs of one kind apart: ``"576x192"`` (in x out) for adapters, ``"192"`` (out) for
            cores that are not square, a number for blocks of one shape; else empty.
        files: engine (``onnx``, ``executorch``) to path.
        error: largest error seen at export on any engine, relative to the largest magnitude of the output; tolerance:
            its bound.
        errors: the same for each engine.
    """

    kind: GraphKind
    key: str = ""
    files: dict[str, BundlePath]
    inputs: tuple[TensorSpec, ...]
    outputs: Annotated[tuple[TensorSpec, ...], msgspec.Meta(min_length=1)]
    error: float
    tolerance: float
    errors: dict[str, float] = {}


class ExecutorchSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the ExecuTorch programs of a bundle need: a runtime not older than the ``version`` of executorch that wrote
    them, ``"1.5.1"``, and of each dynamic dimension of ``TensorSpec`` no more than in ``bounds``."""

    version: Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,6}(\.[0-9]{1,6}){2}\Z")]
    bounds: dict[str, Positive]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything the device needs to know about a bundle.

    Attributes:
        groups: the exchange groups of all modules that can be trained, in execution order.
        order: the place in execution order of each of their modules, as these stand in ``groups``; empty where that is
            the order in which they stand.
        without_activation: full names of those of their modules to which PEFT gives no activated LoRA.
        golden: safetensors file of inputs and outputs: ``<kind>[.<key>].in.<name>`` and ``….out.<name>``.
        files: every other file of the bundle.
    """

    format: int
    software: str
    base_model: BaseModelSpec
    defaults: AdapterDefaults
    groups: Annotated[tuple[GroupSpec, ...], msgspec.Meta(min_length=1)]
    order: tuple[int, ...] = ()
    without_activation: tuple[str, ...] = ()
    embedding: EmbeddingSpec
    head: HeadSpec
    tokenizer: TokenizerSpec
    graphs: tuple[GraphSpec, ...]
    golden: BundlePath
    files: dict[BundlePath, FileSpec]
    executorch: ExecutorchSpec | None = None
    device_blocks: DeviceBlocksSpec | None = None

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that every graph has a file for, sorted."""
        return tuple(sorted(set.intersection(*(set(graph.files) for graph in self.graphs)))) if self.graphs else ()

    def graph(self, kind: GraphKind, key: str = "") -> GraphSpec:
        """The graph of a kind; raises ``BundleError`` where the bundle has none."""
        for graph in self.graphs:
            if graph.kind == kind and graph.key == key:
                return graph
        wanted = f"{kind} graph of {key}" if key else f"{kind} graph"
        raise BundleError(f"the bundle has no {wanted}, which this device needs; export it again")


class _Format(msgspec.Struct):
    format: int


def adapter_key(in_features: int, out_features: int) -> str:
    """The key of the adapter graphs of one shape."""
    return f"{in_features}x{out_features}"


def core_key(width: int | None) -> str:
    """The key of the graphs of a trained matrix of ``width`` rows; None: as many as its rank."""
    return "" if width is None else str(width)


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest as JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def load_manifest(bundle: Path) -> Manifest:
    """Read a bundle's manifest and check every path in it. Raises ``BundleError`` with what to do."""
    path = bundle / MANIFEST_NAME
    try:
        root = bundle.resolve()
        if not lies_inside(bundle, root, MANIFEST_NAME):
            raise BundleError(f"{path} is a link to a file outside the bundle; do not use this bundle")
        _check_is_regular_file(path)
        with path.open("rb") as file:
            raw = file.read(MAX_MANIFEST_BYTES + 1)
        if len(raw) > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} is too large to be a manifest; export the bundle again")
    except FileNotFoundError:
        reason = "has no manifest.json" if bundle.is_dir() else "does not exist"
        raise BundleError(f"{bundle} is not a bundle: it {reason}; make one with dlora-export") from None
    except NotADirectoryError:
        raise BundleError(f"{bundle} is not a bundle directory; make one with dlora-export") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); export the bundle again") from None
    except RuntimeError:
        raise BundleError(f"{path} cannot be read (links in a circle); export the bundle again") from None
    try:
        found = msgspec.json.decode(raw, type=_Format).format
        if found != BUNDLE_FORMAT:
            what_to_do = "update dlora" if found > BUNDLE_FORMAT else "export the bundle again"
            raise BundleError(f"{bundle} has format {found}, this dlora reads format {BUNDLE_FORMAT}; {what_to_do}")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{path} is damaged ({structure_words(error)}); export the bundle again") from None
    for graph in manifest.graphs:
        if len({spec.name for spec in graph.outputs}) != len(graph.outputs):
            raise BundleError(f"{path}: the graph {graph.kind} names an output twice; export the bundle again")
    if not all(group.targets for group in manifest.groups):
        raise BundleError(f"{path}: an exchange group has no target module; export the bundle again")
    modules = sum(len(group.targets) for group in manifest.groups)
    if manifest.order and sorted(manifest.order) != list(range(modules)):
        raise BundleError(f"{path}: its order is not one of its {modules} modules; export the bundle again")
    blocks = () if manifest.device_blocks is None else manifest.device_blocks.blocks
    last = manifest.base_model.blocks
    if [block.index for block in blocks] != list(range(last - len(blocks), last)):
        raise BundleError(f"{path}: its device_blocks are not the last ones; export the bundle again")
    if len({block.path for block in blocks}) != len(blocks):
        raise BundleError(f"{path}: two of its device_blocks have the same path; export the bundle again")
    for field, name in paths_in(manifest, _type_of_manifest(), "manifest"):
        if name not in manifest.files:
            raise BundleError(f"{path}: {field} is {name!r}, which its files do not list; export the bundle again")
        if not lies_inside(bundle, root, name):
            raise BundleError(f"{path}: {field} names a file outside the bundle: {name!r}; do not use this bundle")
    return manifest


@cache
def _type_of_manifest() -> msgspec.inspect.Type:
    return msgspec.inspect.type_info(Manifest)


def _check_is_regular_file(path: Path) -> None:
    """A pipe would keep us waiting, a device never ends. One that is not there is for who opens it."""
    if path.exists() and not path.is_file():
        raise BundleError(f"{path} is no regular file; export the bundle again")


def check_file(bundle: Path, name: str, spec: FileSpec) -> None:
    """Raise ``BundleError`` unless the file has the size and the digest that the manifest gives."""
    path = bundle / name
    try:
        _check_is_regular_file(path)
        if path.stat().st_size != spec.bytes:
            raise BundleError(f"{path} is damaged: its size is not the manifest's; export the bundle again")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise BundleError(f"{path} is missing; export the bundle again") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); export the bundle again") from None
    if digest != spec.sha256:
        raise BundleError(f"{path} is damaged: its SHA-256 is not the manifest's; export the bundle again")
