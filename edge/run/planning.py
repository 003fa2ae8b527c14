"""What could be run here: a row for each kind and number of blocks on the device, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import msgspec
import numpy as np
import psutil

from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.examples import Dataset
from dlora.edge.model.cached_source import texts_of
from dlora.edge.model.trunk import MOST_TOKENS
from dlora.edge.settings import Settings
from dlora.edge.training.expected import (
    EvaluationPlan,
    evaluations_mb,
    expected_mb,
    expected_round_trips,
    filling,
    first_rate_mb,
    first_rows_bytes,
    reads_bytes,
    set_up_mb,
)
from dlora.edge.training.resolve import resolve
from dlora.edge.training.resolved import Resolved
from dlora.protocol.adapters import parameter_count
from dlora.protocol.choices import KindChoice
from dlora.protocol.device_memory import STORED_DTYPES, DeviceModel, training_bytes
from dlora.protocol.errors import BundleError, UsageError
from dlora.protocol.limits import USUAL_WINDOW
from dlora.protocol.manifest import Manifest, StoredDtype
from dlora.protocol.sizes import parse_size
from dlora.protocol.targets import ALL_LINEAR, choose_groups, module_names
from dlora.protocol.traffic import Traffic

from .footprint import split_bytes

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
        wire_mb: all that crosses, evaluations among it; of mean micro-batches where blocks are exchanged with, else
            exact.
        cache_mb: on this device's disk.
        problem: why it cannot be, in words; the numbers say nothing then.
    """

    kind: KindChoice
    device_blocks: int
    of: int
    adapters: str = ""
    peak_mb: float = 0.0
    fits: bool = False
    peak_mb_as: dict[StoredDtype, float] = {}
    would_fit_as: StoredDtype | None = None
    wire_mb: float = 0.0
    round_trips: int = 0
    cache_mb: float = 0.0
    problem: str = ""

    @property
    def word(self) -> str:
        """What ``--device-blocks`` is told."""
        return "all" if self.device_blocks == self.of else str(self.device_blocks)

    @property
    def options(self) -> str:
        """What of it ``dlora-edge train`` is told."""
        return f"--device-blocks {self.word}" + ("" if self.device_blocks else f" --kind {self.kind}")


@dataclass(frozen=True)
class Question:
    """What a plan is made for.

    Attributes:
        loaded: the data to train on, and those to evaluate on where there are some.
        memory: bytes that the process may take.
        fillings: what it takes to fill a cache, found so far: the same for any number of blocks.
    """

    settings: Settings
    manifest: Manifest
    init: LoadedAdapter | None
    loaded: Sequence[Dataset]
    memory: float
    fillings: dict[tuple[object, ...], tuple[Traffic, int]] = field(default_factory=dict)


def available_memory(asked: str | None) -> float:
    """Bytes that a run may take: as ``--memory`` says, or what is available now. Raises ``UsageError``."""
    return float(psutil.virtual_memory().available) if asked is None else parse_size(asked, "--memory")


def rows_of(question: Question) -> list[Row]:
    """Every way that is worth a look, those that cannot be among them, with the reason."""
    return [_row(question, *candidate) for candidate in _candidates(question)]


def _candidates(question: Question) -> list[tuple[KindChoice, int]]:
    """Kinds, and numbers of blocks on the device."""
    manifest, asked = question.manifest, question.settings.placement.device_blocks
    spec, last = manifest.device_blocks, manifest.base_model.blocks
    has = 0 if spec is None else len(spec.blocks)
    kinds: tuple[KindChoice, ...] = ("bottleneck", "lora")
    if question.settings.adapter.kind is not None:
        kinds = (question.settings.adapter.kind,)
    elif question.init is not None:
        parts = question.init.parts
        kinds = (msgspec.convert("lora" if parts is None else parts.kind, KindChoice),)
    counts = sorted({count for count in (0, *_STEPS, has) if count <= has})
    if asked != "auto":
        counts = [last if asked == "all" else int(asked)]
    return [(kind, count) for count in counts for kind in kinds if not count or kind == "lora"]


def settings_for(settings: Settings, row: Row) -> Settings:
    """``settings`` with one way to run in place of ``auto``."""
    server = None if row.device_blocks == row.of else settings.server.server
    return settings.replaced(device_blocks=row.word, kind=row.kind, server=server)


def _row(question: Question, kind: KindChoice, count: int) -> Row:
    manifest = question.manifest
    bare = Row(kind=kind, device_blocks=count, of=manifest.base_model.blocks)
    settings = settings_for(question.settings, bare)
    if bare.word != "all" and settings.server.server is None:
        settings = settings.replaced(server=_NO_SERVER)
    try:
        config, datasets = resolve(settings, manifest, question.init, question.loaded)
    except (UsageError, BundleError) as error:
        return msgspec.structs.replace(bare, problem=str(error))
    spec = manifest.device_blocks
    peaks: dict[StoredDtype, float] = {}
    tokens = _largest_micro_batch(config, datasets)
    if not config.device_blocks or spec is None:
        together = min(config.window, config.training.grad_accum, USUAL_WINDOW)
        peak = split_bytes(manifest, config.spec, config.groups(manifest), tokens, together=together)
    else:
        peaks = _device_peaks(config, manifest, tokens)
        peak = peaks[spec.dtype]
    wire_mb, round_trips, cache_mb = _traffic(config, datasets, manifest, question.fillings)
    return msgspec.structs.replace(
        bare,
        adapters=_adapters(config, manifest),
        peak_mb=round(peak / 1e6, 1),
        fits=peak <= question.memory,
        peak_mb_as={dtype: round(each / 1e6, 1) for dtype, each in peaks.items()},
        would_fit_as=_smaller_that_fits(peaks, peak, question.memory),
        wire_mb=round(wire_mb, 3),
        round_trips=round_trips,
        cache_mb=round(cache_mb, 3),
    )


def _device_peaks(config: Resolved, manifest: Manifest, tokens: int) -> dict[StoredDtype, float]:
    """By how the blocks are stored."""
    base = manifest.base_model
    trained = parameter_count(config.spec, config.groups(manifest))
    sizes = base.blocks, base.hidden_size, base.vocabulary_size, manifest.groups, manifest.head.dtype
    return {
        dtype: training_bytes(DeviceModel(*sizes, dtype), config.device_blocks, tokens, config.adapter.rank, trained)
        for dtype in STORED_DTYPES
    }


def _smaller_that_fits(peaks: Mapping[StoredDtype, float], peak: float, memory: float) -> StoredDtype | None:
    if peak <= memory:
        return None
    fitting = [dtype for dtype, each in peaks.items() if each <= memory]
    return max(fitting, key=peaks.__getitem__, default=None)


def _traffic(
    config: Resolved,
    datasets: Sequence[Dataset],
    manifest: Manifest,
    fillings: dict[tuple[object, ...], tuple[Traffic, int]],
) -> tuple[float, int, float]:
    """MB that cross, round trips, and MB of caches: of what a server gave whatever their limit is."""
    dataset, *evaluated = datasets
    of_first = 0.0
    if config.keeps_outputs and config.invocation:
        of_first = first_rows_bytes(config, manifest, dataset) / 1e6
    if not config.needs_server:
        return 0.0, 0, of_first
    if config.asks_once:
        # Which examples a run takes that does not get through its data once, its seed says; here they are the first.
        count = min(len(dataset), config.total_steps * config.examples_a_step)
        key = (config.server.wire_dtype, config.server.send, count)
        if key not in fillings:
            texts = [texts_of(dataset, range(count)), *(texts_of(each) for each in evaluated)]
            fillings[key] = filling(config, manifest, chain(*texts))
        traffic, kept = fillings[key]
        return (traffic.bytes_up + traffic.bytes_down) / 1e6, traffic.round_trips, kept / 1e6 + of_first
    wire_mb = expected_mb(config, manifest, dataset, 0)
    wire_mb += first_rate_mb(config, manifest, dataset)
    wire_mb += set_up_mb(config, manifest, dataset, has_state=config.adapter.init_adapter is not None)
    for each in evaluated:
        wire_mb += evaluations_mb(config, manifest, EvaluationPlan(each, config.evaluate_every), 0)
    of_reads = reads_bytes(config, manifest, dataset) / 1e6 if config.keeps_reads else 0.0
    return wire_mb, round(expected_round_trips(config, manifest, dataset)), of_reads


def _largest_micro_batch(config: Resolved, datasets: Sequence[Dataset]) -> int:
    """Tokens of the largest micro-batch that may come up: its longest examples may come together."""
    most = 0
    for dataset in datasets:
        longest = np.sort(dataset.lengths)[::-1][: config.training.batch_size]
        tokens = int(longest.sum())
        if config.device_blocks:  # where the device cuts them
            tokens = min(tokens, max(MOST_TOKENS, int(longest[0])))
        most = max(most, tokens)
    return most


def _adapters(config: Resolved, manifest: Manifest) -> str:
    """What is trained: ``r 96 on all linear, 8 blocks``; all blocks, or those on the device, are not named."""
    groups = config.groups(manifest)
    names, blocks = module_names(groups), {group.block for group in groups}
    everything = module_names(choose_groups(manifest, (ALL_LINEAR,)))
    where = "all linear" if names == everything else ", ".join(names)
    usual = len(blocks) == (config.device_blocks or manifest.base_model.blocks)
    return f"r {config.adapter.rank} on {where}" + ("" if usual else f", {len(blocks)} blocks")
