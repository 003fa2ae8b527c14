"""Makes a bundle: loads, traces, writes and verifies, in this order, and puts it in its place last."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import safetensors.numpy

from dlora.cloud.model.base_model import BaseModel, find_embedding, find_head, find_source, load_model, reach
from dlora.cloud.model.low_bits import round_to_low_bits
from dlora.cloud.model.widening import compute_in_float32
from dlora.export.graphs.block_materials import DeviceBlocks
from dlora.export.graphs.golden_case import Materials
from dlora.export.graphs.registry import make_graphs
from dlora.export.tracing.calls import CannotRunOnDevice
from dlora.export.tracing.entry import CannotBeginOnDevice
from dlora.protocol import interrupts
from dlora.protocol.device_memory import USUAL_TOKENS, DeviceModel, blocks_that_fit, training_bytes
from dlora.protocol.errors import ExportError, UsageError
from dlora.protocol.groups import GroupSpec
from dlora.protocol.manifest import (
    MANIFEST_NAME,
    AdapterDefaults,
    BaseModelSpec,
    ExecutorchSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    encode_manifest,
)
from dlora.protocol.text import one_line
from dlora.protocol.version import BUNDLE_FORMAT, SOFTWARE_VERSION

from .block_weights import save_device_blocks
from .device_blocks import prepare_blocks
from .end_weights import save_embedding, save_head
from .gains import with_measured_gains
from .installed import check_executorch
from .output_directory import new_directory_for
from .selection import Selection, can_be_activated, select_targets
from .settings import ExportSettings
from .to_executorch import BOUNDS, bounds_for
from .tokenizer import load_tokenizer, save_tokenizer
from .verify import Verified, compilers, real_hidden_states, verify

SUFFIXES: Final = {"onnx": "onnx", "executorch": "pte"}
_GOLDEN: Final = "golden.safetensors"
Say = Callable[[str], None]


def export_bundle(
    settings: ExportSettings, say: Say = lambda _: None, note: Say = lambda _: None, tell: Say = lambda _: None
) -> Manifest:
    """Export a bundle to ``settings.out``; ``say`` is called with what is being done, ``note`` with choices
    that nobody asked for, ``tell`` with what takes long: that the hub is asked, and each block.

    Raises ``UsageError``, ``MissingExtraError`` or ``ExportError``; nothing is left behind then, and a bundle that
    was there before is intact.
    """
    settings.check()
    say(f"loading {settings.model}")
    source = reach(find_source(settings.model), tell)
    model = load_model(source, dtype=None)
    round_to_low_bits(model, settings.weight_format)
    compute_in_float32(model)
    base = BaseModel.from_model(model, settings.model, settings.weight_format)
    tokenizer = load_tokenizer(source, base)
    name = one_line(settings.base_model_name or source.hub_id or settings.model)
    if name == settings.model and Path(name).exists():
        note(f"adapters will say that their base model is {name}; --base-model-name gives it another name")
    selection = select_targets(base, settings.target_modules)
    for line in selection.notes:
        note(line)
    embedding, head = find_embedding(base), find_head(base)
    groups = with_measured_gains(base, embedding, base.groups(selection.trainable))
    blocks = _device_blocks(settings, base, selection, groups, say, note, tell)
    if blocks is not None and blocks.without_decode is not None:
        note(f"the blocks can be trained on a device, but not generate there: {blocks.without_decode}")
    with interrupts.raise_on_signal(), new_directory_for(settings.out, settings.force) as bundle:
        say("writing weights and tokenizer")
        embedding_spec, embedding_inputs = save_embedding(bundle, embedding, settings.dtype_of_embedding)
        head_spec, head_inputs = save_head(bundle, head, settings.head_dtype, embedding_spec, embedding_inputs)
        tokenizer_spec = save_tokenizer(bundle, tokenizer, base)
        materials = Materials(
            shapes=_shapes(groups),
            rank=settings.rank,
            scaling=settings.alpha / settings.rank,
            embedding=embedding,
            embedding_spec=embedding_spec,
            embedding_weights=embedding_inputs,
            head=head,
            head_spec=head_spec,
            head_weights=head_inputs,
            hidden_states=real_hidden_states(base, embedding),
            device_blocks=blocks,
        )
        blocks_spec = None if blocks is None else save_device_blocks(bundle, blocks)
        bounds = BOUNDS if blocks is None else bounds_for(blocks.max_length)
        engines = compilers(settings.engines, bounds)
        verified: list[Verified] = []
        for graph, tests in make_graphs(materials):
            verified.append(verify(graph, tests, engines))
            say(f"verified {graph.name}")
        graphs = tuple(_save_graph(bundle, made) for made in verified)
        _save_golden(bundle, verified)
        say("hashing")
        of_base = msgspec.convert(base, BaseModelSpec, from_attributes=True)
        manifest = Manifest(
            format=BUNDLE_FORMAT,
            software=SOFTWARE_VERSION,
            base_model=msgspec.structs.replace(of_base, name=name),
            defaults=AdapterDefaults(settings.rank, settings.alpha, selection.target_modules),
            groups=groups,
            order=_order(base, groups),
            without_activation=tuple(name for name in selection.trainable if not can_be_activated(base, name)),
            embedding=embedding_spec,
            head=head_spec,
            tokenizer=tokenizer_spec,
            graphs=graphs,
            golden=_GOLDEN,
            files=_describe_files(bundle),
            executorch=ExecutorchSpec(check_executorch(), dict(bounds)) if "executorch" in settings.engines else None,
            device_blocks=blocks_spec,
        )
        (bundle / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return manifest


def _device_blocks(
    settings: ExportSettings,
    base: BaseModel,
    selection: Selection,
    groups: Sequence[GroupSpec],
    say: Say,
    note: Say,
    tell: Say,
) -> DeviceBlocks | None:
    """Those that were asked for; raises where they cannot be. Else those that a device's memory holds; says where they
    cannot be, and goes on with fewer, or none."""
    count = base.blocks if settings.device_blocks == "all" else settings.device_blocks
    is_asked_for = count is not None
    if count is None:
        count = _blocks_for(settings, base, groups, note)
    if count > base.blocks:
        raise UsageError(f"--device-blocks {count} is more than the {base.blocks} blocks of {base.name}")
    name = f"{base.name} ({base.architecture})"
    while count:
        try:
            return prepare_blocks(base, selection.trainable, count, settings.block_dtype, say, tell)
        except CannotBeginOnDevice as error:
            count -= 1
            problem, advice = f"{name} cannot run on a device alone: {error}", f"--device-blocks {count} is the most"
            outcome = f"; it gets {count} blocks"
        except CannotRunOnDevice as error:
            count = 0
            problem, advice = f"{name} has no blocks for a device: {error}", "leave out --device-blocks"
            outcome = ""
        if is_asked_for:
            raise ExportError(f"{problem}; {advice}")
        note(problem + outcome)
    return None


def _blocks_for(settings: ExportSettings, base: BaseModel, groups: Sequence[GroupSpec], note: Say) -> int:
    """As many blocks as ``--device-memory`` holds while they are trained; none where nothing was said."""
    if settings.device_memory is None:
        return 0
    model = DeviceModel(
        base.blocks, base.hidden_size, base.vocabulary_size, groups, settings.head_dtype, settings.block_dtype
    )
    count = blocks_that_fit(model, settings.device_memory, rank=settings.rank)
    peak = training_bytes(model, max(1, count), USUAL_TOKENS, settings.rank) / 1e6
    tells = f"training takes about {peak:,.0f} MB with {max(1, count)}, at {USUAL_TOKENS} tokens a micro-batch"
    note(f"--device-memory {settings.device_memory / 1e6:,.0f} MB holds {count} of {base.blocks} blocks: {tells}")
    return count


def _shapes(groups: Sequence[GroupSpec]) -> tuple[tuple[int, int], ...]:
    """(in_features, out_features) of the adapters that groups may have, each once."""
    return tuple(sorted({(group.in_features, target.out_features) for group in groups for target in group.targets}))


def _order(base: BaseModel, groups: Sequence[GroupSpec]) -> tuple[int, ...]:
    """Each module's place in execution order, as modules stand in groups; empty where they stand in it."""
    ran = [base.targets[target.name].order for group in groups for target in group.targets]
    places = {order: place for place, order in enumerate(sorted(ran))}
    order = tuple(places[each] for each in ran)
    return () if order == tuple(range(len(order))) else order


def _save_graph(bundle: Path, made: Verified) -> GraphSpec:
    graph = made.graph
    files = {engine: f"graphs/{graph.name}.{SUFFIXES[engine]}" for engine in made.models}
    (bundle / "graphs").mkdir(exist_ok=True)
    for engine, name in files.items():
        (bundle / name).write_bytes(made.models[engine])
    return GraphSpec(
        kind=graph.kind,
        key=graph.key,
        files=files,
        inputs=graph.inputs,
        outputs=graph.outputs,
        error=_rounded(made.error),
        tolerance=made.tolerance,
        errors={engine: _rounded(error) for engine, error in made.errors.items()},
    )


def _rounded(error: float) -> float:
    """Two digits say all that an error says, and the same on every machine of a kind."""
    return float(f"{error:.1e}")


def _save_golden(bundle: Path, verified: Sequence[Verified]) -> None:
    vectors = {f"{made.graph.name}.{name}": value for made in verified for name, value in made.golden.items()}
    # safetensors writes the memory as it lies, transposed or not.
    tensors = {name: np.asarray(value, order="C") for name, value in vectors.items()}
    (bundle / _GOLDEN).write_bytes(safetensors.numpy.save(tensors))  # save_file gives mode 0600


def _describe_files(bundle: Path) -> dict[str, FileSpec]:
    files: dict[str, FileSpec] = {}
    for path in sorted(bundle.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.relative_to(bundle).as_posix()] = FileSpec(path.stat().st_size, digest)
    return files
