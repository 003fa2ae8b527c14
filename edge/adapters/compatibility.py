"""Whether things fit together: a bundle and a server, an adapter and a bundle."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dlora.edge.engine.bundle import Bundle
from dlora.protocol import messages as m
from dlora.protocol.errors import CheckpointError, DataError, ModelMismatchError
from dlora.protocol.groups import GroupSpec, with_gains
from dlora.protocol.manifest import Manifest
from dlora.protocol.passes import Passes

from .parts import PARTS_NAME, Parts
from .peft import LoadedAdapter
from .units import AdapterSet


def check_base_model(bundle: Bundle, welcome: m.Welcome) -> None:
    """Raise ``ModelMismatchError`` unless the server serves the base model that the bundle pins."""
    base = bundle.manifest.base_model
    if welcome.base_weight_format != base.weight_format:
        raise ModelMismatchError(
            f"the server holds {welcome.base_weight_format} weights of {welcome.base_model}, the bundle is of "
            f"{base.weight_format} ones of {base.name}: serve it with dlora-cloud serve MODEL --weights "
            f"{base.weight_format}, or export a bundle with dlora-export MODEL --weights {welcome.base_weight_format}"
        )
    if welcome.base_fingerprint != base.fingerprint:
        raise ModelMismatchError(
            f"the server serves {welcome.base_model} ({welcome.base_fingerprint[:12]}…), the bundle is of {base.name} "
            f"({base.fingerprint[:12]}…); serve that model, or export a bundle of the server's"
        )
    if (welcome.embedding_size, welcome.hidden_size) != (base.embedding_size, base.hidden_size):
        raise ModelMismatchError(
            f"the server says that {welcome.base_model} is {welcome.embedding_size} and {welcome.hidden_size} wide, "
            f"the bundle {base.embedding_size} and {base.hidden_size}; export a bundle of the server's"
        )


def check_sequence_length(longest: int, welcome: m.Welcome) -> None:
    """Raise ``DataError`` where the server would refuse a sequence of ``longest`` tokens."""
    if longest > welcome.max_sequence_length:
        raise DataError(
            f"the data has a sequence of {longest} tokens, the server takes {welcome.max_sequence_length}; "
            f"set --max-length {welcome.max_sequence_length}"
        )


def check_adapter(manifest: Manifest, loaded: LoadedAdapter) -> None:
    """Raise ``ModelMismatchError`` where an adapter says that it is of other weights than those the bundle is of."""
    base, record = manifest.base_model, loaded.record
    if record is not None and record.base_weight_format != base.weight_format:
        raise ModelMismatchError(
            f"the adapter was trained for {record.base_weight_format} weights of {record.base_model}, the bundle is of "
            f"{base.weight_format} ones: export one with dlora-export MODEL --weights {record.base_weight_format}, and "
            f"serve it with dlora-cloud serve MODEL --weights {record.base_weight_format}"
        )
    if record is not None and record.base_fingerprint != base.fingerprint:
        raise ModelMismatchError(
            f"the adapter was trained on {record.base_model} ({record.base_fingerprint[:12]}…), the bundle is of "
            f"{base.name} ({base.fingerprint[:12]}…); take an adapter of that base model, or a bundle of the adapter's"
        )


def check_fit(manifest: Manifest, loaded: LoadedAdapter) -> None:
    """Raise ``ModelMismatchError`` or ``CheckpointError`` unless a bundle's model can use an adapter."""
    check_adapter(manifest, loaded)
    _check_modules(manifest.groups, loaded, "take an adapter of the bundle's base model")


def check_passes(loaded: LoadedAdapter, passes: str) -> None:
    """Raise ``CheckpointError`` where an adapter that was trained in passes would be used in others: in fewer it may be
    far worse. Live it can be used, and one that was trained live can go on in any."""
    trained = _trained_passes(loaded)
    if "live" not in (passes, trained) and passes != trained:
        raise CheckpointError(f"the adapter was trained in passes {trained}; give --passes live, or --passes {trained}")


def passes_to_use(loaded: LoadedAdapter, passes: str) -> Passes | None:
    """How an adapter is asked that is used: ``live``, in passes, or ``auto``, as it was trained; None: live.

    Raises as ``check_passes``, and ``CheckpointError`` where its record names none that there are.
    """
    word = _trained_passes(loaded) if passes == "auto" else passes
    check_passes(loaded, word)
    if word == "live":
        return None
    try:
        return msgspec.convert(word.split(","), Passes, strict=False)
    except msgspec.ValidationError:
        raise CheckpointError("the adapter's record names passes that there are not; give --passes live") from None


def _trained_passes(loaded: LoadedAdapter) -> str:
    training = loaded.record.training if loaded.record is not None else None
    return "live" if training is None else str(training.recipe.get("passes", "live"))


def with_saved_gains(groups: Sequence[GroupSpec], kind: str, loaded: LoadedAdapter | None) -> tuple[GroupSpec, ...]:
    """``groups`` with the gains that an adapter of the same ``kind`` was trained with, as far as it has parts."""
    if loaded is None or loaded.parts is None or loaded.parts.kind != kind:
        return tuple(groups)
    gains = {target.name: target.gain for group in groups for target in group.targets}
    gains |= {name: loaded.parts.gains.get(name, 1.0) for name in loaded.modules}
    return with_gains(groups, lambda name: gains[name])


def load_weights(adapters: AdapterSet, loaded: LoadedAdapter, invocation: tuple[int, ...]) -> None:
    """Put a saved adapter's weights in; modules that it lacks keep their start, whose delta is zero.

    Raises ``CheckpointError`` where it does not fit. A saved scaling other than this run's is folded into B.

    ``invocation``: the tokens from which on ``adapters`` act; none: everywhere.
    """
    if loaded.invocation != invocation:
        where = (
            "everywhere; train with --active-from start"
            if not loaded.invocation
            else (
                f"from its own invocation on (tokens {', '.join(map(str, loaded.invocation))}); train with "
                "--active-from answer, on data whose answers begin so"
            )
        )
        raise CheckpointError(f"the adapter acts {where}")
    spec, parts = adapters.adapter_spec, loaded.parts
    _check_modules(
        adapters.group_specs, loaded,
        "take an adapter of the bundle's base model, or train all of its modules (--target-modules, --blocks)",
    )  # fmt: skip
    of = _of(loaded)
    if parts is not None and parts.kind == spec.kind:
        if parts.r != spec.r:
            raise CheckpointError(f"the adapter{of} has rank {parts.r}; train with --rank {parts.r}")
        _load_parts(adapters, parts, of)
        return
    for group in adapters.groups:
        group.load_factors(loaded.modules, loaded.scaling)


def _check_modules(groups: Sequence[GroupSpec], loaded: LoadedAdapter, advice: str) -> None:
    """Raise ``CheckpointError`` where a module is none of those of ``groups``, or has other widths."""
    widths = {target.name: (group.in_features, target.out_features) for group in groups for target in group.targets}
    of = _of(loaded)
    for name, module in loaded.modules.items():
        wanted = widths.get(name)
        if wanted is None:
            raise CheckpointError(f"the adapter{of} has {name}, which has no adapter here; {advice}")
        found = (module.lora_A.shape[1], module.lora_B.shape[0])
        if found != wanted:
            raise CheckpointError(
                f"the adapter{of} is of another base model: its {name} goes from {found[0]} to {found[1]} numbers, "
                f"the bundle's from {wanted[0]} to {wanted[1]}"
            )


def _of(loaded: LoadedAdapter) -> str:
    return f" (of {loaded.base_model_name})" if loaded.base_model_name else ""


def _load_parts(adapters: AdapterSet, parts: Parts, of: str) -> None:
    """Go on from what an adapter was trained as."""
    ratio = parts.scaling / adapters.scaling
    try:
        loaded = set[str]().union(*(group.load_parts(parts.tensors, ratio) for group in adapters.groups))
        if loaded != set(parts.tensors):
            raise ValueError("parts of groups that are not here")
    except ValueError as error:
        raise CheckpointError(
            f"the adapter{of} has other parts than these groups ({error}); train the same target modules "
            f"(--target-modules all-linear, or as they were), or delete its {PARTS_NAME}, and it is an ordinary LoRA"
        ) from None
