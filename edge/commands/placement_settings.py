"""Where a run's blocks are: its options, completed with what they leave open, before anything else is chosen."""

from __future__ import annotations

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
    """``settings`` with all that follows from ``--mode``, as ``run.json`` keeps it.

    In the mode ``trunk`` LoRA stands beside every linear module of the device's blocks, where nothing else is said; a
    killed unit keeps its effect, which costs no traffic there. Raises ``UsageError`` for options that cannot go
    together, and ``BundleError`` for a bundle without enough blocks.
    """
    if settings.mode == "split":
        for option, is_given in (
            ("--device-blocks", settings.device_blocks is not None),
            ("--cache-mb", settings.cache_mb is not None),
            ("--keep-cache", settings.keep_cache),
        ):
            if is_given:
                raise UsageError(f"{option} needs --mode trunk, in which blocks run on this device")
        return settings
    _check(settings, init)
    spec = manifest.device_blocks
    has = 0 if spec is None else len(spec.blocks)
    last = manifest.base_model.blocks
    count = settings.device_blocks or min(has, last - 1)
    if count >= last:
        raise UsageError(f"--device-blocks {count}: the server runs one block at the least; the model has {last}")
    if count > has or not count:
        text = f"the bundle has {has} blocks for a device; export it again with --device-blocks {max(1, count)}"
        raise BundleError(f"{text}, or lower --device-blocks" if has else text)
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


def has_room_to_hold(settings: RunSettings, manifest: Manifest, codecs: Codecs, dataset: Dataset) -> bool:
    """Whether ``--cache-mb`` allows that what comes out of killed blocks is kept, too, for all of the data."""
    if settings.mode == "split" or settings.cache_mb is None:
        return False
    from dlora.edge.model.trunk_cache import most_bytes
    from dlora.edge.model.trunk_source import encoded_width

    wire = codecs.of(TensorRole.LAST_HIDDEN_STATES).dtype
    tokens, width = int(dataset.lengths.sum()), encoded_width(manifest)
    wanted = sum(most_bytes(len(dataset), tokens, width, codec) for codec in (wire, "fp32"))
    return wanted <= settings.cache_mb * 1e6


def _check(settings: RunSettings, init: LoadedAdapter | None) -> None:
    """Raise ``UsageError`` for options that do not go with ``--mode trunk``."""
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
            raise UsageError(f"{option} cannot be with --mode trunk: {what_to_do}")
