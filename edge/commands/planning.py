"""What could be run here: a row for each mode, kind and number of blocks on the device, and the one to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

import msgspec

from dlora.edge.choices import RunMode
from dlora.edge.model.trunk_source import texts_of
from dlora.edge.run.estimate import largest_micro_batch, minutes_of
from dlora.edge.run.plan import (
    EvaluationPlan,
    evaluations_mb,
    expected_mb,
    expected_round_trips,
    filling,
    first_rate_mb,
    set_up_mb,
)
from dlora.edge.run.quality import Measured, quality_of
from dlora.edge.run.run_file import RunSettings
from dlora.edge.training.config import TrainConfig
from dlora.protocol.adapters import parameter_count
from dlora.protocol.choices import KindChoice
from dlora.protocol.device_memory import BLOCK_DTYPES, DeviceModel, training_bytes
from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.manifest import BlockDtype, Manifest
from dlora.protocol.targets import ALL_LINEAR, choose_groups, module_names
from dlora.protocol.traffic import Traffic

from .footprint import split_bytes
from .run_config import Configured, check_before_data, configure

if TYPE_CHECKING:
    from dlora.edge.adapters.peft import LoadedAdapter
    from dlora.edge.data.examples import Dataset
    from dlora.edge.run.calibration import DeviceSpeed, ServerSpeed

_STEPS: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)  # blocks on the device that are looked at, up to the bundle's
_NO_SERVER: Final = "ws://server"  # in place of the address of one that is not named


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run, and what it takes.

    Attributes:
        device_blocks: how many blocks run on the device; of: how many there are.
        adapters: what is trained, and in which blocks.
        peak_mb: of this process's memory, an estimate; fits: whether that is within what was given.
        peak_mb_as: likewise, by how the bundle's blocks might be stored; nothing where none run here.
        would_fit_as: the largest of these that is smaller than the bundle's and fits; None where it fits as it is.
        wire_mb: all that crosses, evaluations among it; exact for ``trunk``, of mean micro-batches for ``split``.
        cache_mb: on this device's disk.
        minutes: an estimate from a calibration; None without one.
        quality: what is known of it; holds: whether it was measured, and is as good as LoRA in all blocks.
        problem: why it cannot be, in words; the numbers say nothing then.
    """

    mode: RunMode
    kind: KindChoice
    device_blocks: int
    of: int
    adapters: str = ""
    peak_mb: float = 0.0
    fits: bool = False
    peak_mb_as: dict[BlockDtype, float] = {}
    would_fit_as: BlockDtype | None = None
    wire_mb: float = 0.0
    round_trips: int = 0
    cache_mb: float = 0.0
    minutes: float | None = None
    quality: str = ""
    holds: bool = False
    problem: str = ""

    @property
    def options(self) -> str:
        """What of it ``dlora-edge train`` is told."""
        if self.mode == "trunk":
            return f"--mode trunk --device-blocks {self.device_blocks}"
        return f"--mode {self.mode} --kind {self.kind}" if self.mode == "split" else "--mode local"


@dataclass(frozen=True)
class Question:
    """What a plan is made for.

    Attributes:
        settings: of a run, its mode ``auto``.
        loaded: the data to train on, and those to evaluate on where there are some.
        memory: bytes that the process may take.
        device, server: how fast they are, where that was measured.
        fillings: what it takes to fill a cache, found so far: the same for any number of blocks.
    """

    settings: RunSettings
    manifest: Manifest
    init: LoadedAdapter | None
    loaded: Sequence[Dataset]
    memory: float
    device: DeviceSpeed | None = None
    server: ServerSpeed | None = None
    fillings: dict[tuple[object, ...], tuple[Traffic, int]] = field(default_factory=dict)


def rows_of(question: Question) -> list[Row]:
    """Every way that is worth a look, those that cannot be among them, with the reason."""
    return [_row(question, *candidate) for candidate in _candidates(question)]


def _candidates(question: Question) -> list[tuple[RunMode, KindChoice, int]]:
    settings, manifest = question.settings, question.manifest
    spec, last = manifest.device_blocks, manifest.base_model.blocks
    has = 0 if spec is None else len(spec.blocks)
    kinds = _kinds(question)
    most = min(has, last - 1)
    counts = sorted({count for count in (*_STEPS, most) if 0 < count <= most})
    if settings.device_blocks is not None:
        counts = [settings.device_blocks]
    found: list[tuple[RunMode, KindChoice, int]] = [("split", kind, 0) for kind in kinds]
    if "lora" in kinds:
        found += [("trunk", "lora", count) for count in counts]
        found += [("local", "lora", last)] * (has == last)
    return found


def _kinds(question: Question) -> tuple[KindChoice, ...]:
    if question.settings.kind is not None:
        return (question.settings.kind,)
    if question.init is not None:
        parts = question.init.parts
        return (msgspec.convert("lora" if parts is None else parts.kind, KindChoice),)
    return ("bottleneck", "lora")


def settings_for(settings: RunSettings, mode: RunMode, kind: KindChoice, count: int) -> RunSettings:
    """``settings`` with one way to run in place of ``auto``."""
    return msgspec.structs.replace(
        settings,
        mode=mode,
        kind=kind,
        device_blocks=count if mode == "trunk" else settings.device_blocks,
        server=None if mode == "local" else settings.server,
    )


def _row(question: Question, mode: RunMode, kind: KindChoice, count: int) -> Row:
    manifest = question.manifest
    bare = Row(mode=mode, kind=kind, device_blocks=count, of=manifest.base_model.blocks)
    settings = settings_for(question.settings, mode, kind, count)
    if mode != "local" and settings.server is None:
        settings = msgspec.structs.replace(settings, server=_NO_SERVER)
    try:
        settings = check_before_data(settings, manifest, question.init)
        configured = configure(settings, manifest, question.init, question.loaded, lambda _: None)
    except (UsageError, BundleError) as error:
        return msgspec.structs.replace(bare, problem=str(error))
    spec = manifest.device_blocks
    peaks: dict[BlockDtype, float] = {}
    if configured.config.mode == "split" or spec is None:
        peak = _split_peak(configured, manifest)
    else:
        peaks = _device_peaks(configured, manifest)
        peak = peaks[spec.dtype]
    wire_mb, round_trips, cache_mb = _traffic(configured, manifest, question.fillings)
    minutes = minutes_of(
        configured.config,
        manifest,
        configured.dataset,
        _evaluations(configured),
        question.device,
        question.server,
        wire_bytes=wire_mb * 1e6,
        round_trips=round_trips,
    )
    measured = quality_of(mode, kind, count / bare.of)
    return msgspec.structs.replace(
        bare,
        adapters=_adapters(configured.config, manifest),
        peak_mb=round(peak / 1e6, 1),
        fits=peak <= question.memory,
        peak_mb_as={dtype: round(each / 1e6, 1) for dtype, each in peaks.items()},
        would_fit_as=_smaller_that_fits(peaks, peak, question.memory),
        wire_mb=round(wire_mb, 3),
        round_trips=round_trips,
        cache_mb=round(cache_mb, 3),
        minutes=minutes,
        **_quality(measured, count, question),
    )


def _quality(measured: Measured | None, count: int, question: Question) -> dict[str, Any]:
    spec, settings = question.manifest.device_blocks, question.settings
    chosen = (settings.rank, settings.blocks, settings.wire_dtype, settings.target_modules)
    if any(chosen) or settings.active_fraction < 1:
        return {"quality": "not measured with these options"}
    if count and spec is not None and spec.dtype in ("int8", "int4"):
        return {"quality": f"not measured: the blocks on the device are rounded to {spec.dtype}"}
    if measured is None:
        return {"quality": "not measured"}
    return {"quality": f"{measured.finding} ({measured.source})", "holds": measured.holds}


def _split_peak(configured: Configured, manifest: Manifest) -> float:
    config = configured.config
    tokens = largest_micro_batch(config, _datasets(configured))
    return split_bytes(manifest, config.adapter, config.groups(manifest), tokens)


def _device_peaks(configured: Configured, manifest: Manifest) -> dict[BlockDtype, float]:
    """By how the blocks are stored."""
    config, base = configured.config, manifest.base_model
    tokens = largest_micro_batch(config, _datasets(configured))
    trained = parameter_count(config.adapter, config.groups(manifest))
    sizes = base.blocks, base.hidden_size, base.vocabulary_size, manifest.groups, manifest.head.dtype
    return {
        dtype: training_bytes(DeviceModel(*sizes, dtype), config.device_blocks, tokens, config.rank, trained)
        for dtype in BLOCK_DTYPES
    }


def _smaller_that_fits(peaks: Mapping[BlockDtype, float], peak: float, memory: float) -> BlockDtype | None:
    if peak <= memory:
        return None
    fitting = [dtype for dtype, each in peaks.items() if each <= memory]
    return max(fitting, key=peaks.__getitem__, default=None)


def _traffic(
    configured: Configured, manifest: Manifest, fillings: dict[tuple[object, ...], tuple[Traffic, int]]
) -> tuple[float, int, float]:
    """MB that cross, round trips, and MB of the cache, whatever its limit is."""
    config, dataset = configured.config, configured.dataset
    if config.mode == "local":
        return 0.0, 0, 0.0
    if config.mode == "trunk":
        a_step = config.batch_size * config.grad_accum
        # Which examples a run takes that does not get through its data once, its seed says; here they are the first.
        count = min(len(dataset), config.total_steps * a_step)
        key = (config.wire_dtype, config.send, config.exact, count)
        if key not in fillings:
            texts = [texts_of(dataset, range(count))]
            texts += [texts_of(configured.evaluated)] if configured.evaluated is not None else []
            fillings[key] = filling(config, manifest, chain(*texts))
        traffic, kept = fillings[key]
        return (traffic.bytes_up + traffic.bytes_down) / 1e6, traffic.round_trips, kept / 1e6
    wire_mb = expected_mb(config, manifest, dataset, 0)
    wire_mb += first_rate_mb(config, manifest, dataset)
    wire_mb += set_up_mb(config, manifest, dataset, has_state=configured.settings.init_adapter is not None)
    round_trips = expected_round_trips(config, manifest, dataset)
    if (evaluations := _evaluations(configured)) is not None:
        wire_mb += evaluations_mb(config, manifest, evaluations, 0)
    return wire_mb, round(round_trips), 0.0


def _datasets(configured: Configured) -> list[Dataset]:
    return [configured.dataset, *([configured.evaluated] if configured.evaluated is not None else [])]


def _evaluations(configured: Configured) -> EvaluationPlan | None:
    evaluated = configured.evaluated
    return None if evaluated is None else EvaluationPlan(evaluated, configured.evaluate_every)


def _adapters(config: TrainConfig, manifest: Manifest) -> str:
    """What is trained: ``r 96 on all linear, 8 blocks``; all blocks, or those on the device, are not named."""
    groups = config.groups(manifest)
    names, blocks = module_names(groups), {group.block for group in groups}
    everything = module_names(choose_groups(manifest, (ALL_LINEAR,)))
    where = "all linear" if names == everything else ", ".join(names)
    usual = len(blocks) == (config.device_blocks or manifest.base_model.blocks)
    return f"r {config.rank} on {where}" + ("" if usual else f", {len(blocks)} blocks")
