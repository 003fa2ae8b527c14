"""Where a run's blocks are: its options, completed with what they leave open, before anything else is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from dlora.edge.run.run_file import RunSettings
from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.manifest import Manifest
from dlora.protocol.targets import ALL_LINEAR, number_ranges
from dlora.protocol.wire_codecs import Codecs, TensorRole

from .adapter_settings import parse_blocks

if TYPE_CHECKING:
    from dlora.edge.adapters.peft import LoadedAdapter
    from dlora.edge.data.examples import Dataset


DEFAULT_CACHE_MB: Final = 4000.0


def choose_placement(settings: RunSettings, manifest: Manifest, init: LoadedAdapter | None) -> RunSettings:
    """``settings`` with all that follows from ``--mode``, which is not ``auto``, as ``run.json`` keeps it.

    In the modes ``trunk`` and ``local`` LoRA stands beside every linear module of the device's blocks, where nothing
    else is said; a killed unit keeps its effect, which costs no traffic there. Raises ``UsageError`` for options that
    cannot go together, and ``BundleError`` for a bundle without enough blocks.
    """
    _check_server(settings)
    is_trunk, is_split = settings.mode == "trunk", settings.mode == "split"
    trunk, kept = "trunk, in which blocks run on this device", "trunk or local, in which hidden states are kept"
    for option, is_given, why in (
        ("--device-blocks", settings.device_blocks is not None and is_split, trunk),
        ("--cache-mb", settings.cache_mb is not None and is_split, kept),
        ("--cache-key-file", settings.cache_key_file is not None and is_split, kept),
        ("--keep-cache", settings.keep_cache and not is_trunk, "trunk, in which a server's answers are kept"),
        ("--exact", settings.exact and not is_trunk, "trunk, in which a server runs texts"),
    ):
        if is_given:
            raise UsageError(f"{option} needs --mode {why}")
    if is_split:
        return settings
    _check(settings, init)
    count = _count(settings, manifest)
    last = manifest.base_model.blocks
    here = range(last - count, last)
    blocks = parse_blocks(settings.blocks, manifest) if settings.blocks else tuple(here)
    if outside := set(blocks) - set(here):
        raise UsageError(
            f"--blocks: only the blocks on this device can be trained, {number_ranges(here)}, not "
            f"{number_ranges(outside)}; name others, or raise --device-blocks"
        )
    return msgspec.structs.replace(
        settings,
        device_blocks=count,
        cache_mb=DEFAULT_CACHE_MB if settings.cache_mb is None else settings.cache_mb,
        kind="lora",
        adapt="all",
        blocks=number_ranges(blocks),
        target_modules=settings.target_modules or ALL_LINEAR,
        kr_on_kill="hold_forward",
        kr_cost_aware=False,  # costs are bytes and round trips
    )


def _check_server(settings: RunSettings) -> None:
    if settings.mode == "local" and settings.server is not None:
        raise UsageError("--mode local asks no server: leave --server out")
    if settings.mode != "local" and settings.server is None:
        raise UsageError(f"--mode {settings.mode} needs --server, which runs the other blocks; --mode local needs none")


def _count(settings: RunSettings, manifest: Manifest) -> int:
    """How many of the last blocks run on the device."""
    spec, last = manifest.device_blocks, manifest.base_model.blocks
    has = 0 if spec is None else len(spec.blocks)
    if settings.mode == "local":
        if settings.device_blocks not in (None, last):
            raise UsageError(
                f"--device-blocks {settings.device_blocks}: with --mode local all {last} blocks run here; leave it "
                "out, or take --mode trunk"
            )
        if has < last:
            raise BundleError(
                f"the bundle has {has} of the model's {last} blocks, and --mode local needs all; export it again with "
                "--device-blocks all"
            )
        return last
    count = settings.device_blocks or min(has, last - 1)
    if count >= last or (has and not count):
        raise UsageError(
            f"--device-blocks {count or last}: the server runs one block at the least; the model has {last} "
            "(--mode local runs all of them here)"
        )
    if count > has or not count:
        text = f"the bundle has {has} blocks for a device; export it again with --device-blocks {max(1, count)}"
        raise BundleError(f"{text}, or lower --device-blocks" if has else text)
    return count


def has_room_to_hold(
    settings: RunSettings, manifest: Manifest, codecs: Codecs, dataset: Dataset, evaluated: Sequence[Dataset]
) -> bool:
    """Whether ``--cache-mb`` allows that what comes out of killed blocks is kept, too, for all data that are trained
    on, beside what a server gives of these and of those that are ``evaluated``."""
    if settings.mode == "split" or settings.cache_mb is None:
        return False
    from dlora.edge.run.plan import cache_bytes

    wire = codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
    from_server = (dataset, *evaluated) if settings.mode == "trunk" else ()
    kept = [(dataset, "fp32"), *((each, wire) for each in from_server)]
    wanted = sum(cache_bytes(manifest, each, codec) for each, codec in kept)
    return wanted <= settings.cache_mb * 1e6


def _check(settings: RunSettings, init: LoadedAdapter | None) -> None:
    """Raise ``UsageError`` for options that do not go with blocks on the device."""
    for option, is_given, what_to_do in (
        (f"--kind {settings.kind}", settings.kind not in (None, "lora"), "it trains LoRA: leave that out"),
        ("--adapt answer", settings.adapt == "answer", "adapters on this device act on all tokens: leave that out"),
        ("--bytes-per-token", settings.bytes_per_token is not None, "its steps send nothing: leave that out"),
        (
            f"--kr-on-kill {settings.kr_on_kill}",
            settings.kr_on_kill in ("give_to_server", "bypass"),
            "a killed unit keeps its effect: leave that out",
        ),
        (
            "--init-adapter",
            init is not None and bool(init.invocation),
            "that adapter acts on answers only; train it with --mode split",
        ),
    ):
        if is_given:
            raise UsageError(f"{option} cannot be with --mode {settings.mode}: {what_to_do}")
