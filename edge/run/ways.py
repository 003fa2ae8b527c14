"""In which ways a run's adapters can be asked, and what a step takes in each: of what was measured, by formula.

docs/how-to/far-from-the-server.md says what the formula leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from dlora.edge.adapters.compatibility import check_passes
from dlora.edge.adapters.peft import LoadedAdapter
from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.data.examples import Dataset
from dlora.edge.engine.bundle import Bundle
from dlora.edge.training.expected import mean_step_traffic
from dlora.edge.training.resolve import with_kept_reads
from dlora.edge.training.resolved import Resolved
from dlora.edge.wire.connecting import ConnectSettings
from dlora.protocol.errors import CheckpointError, DloraError
from dlora.protocol.manifest import Manifest
from dlora.protocol.passes import Passes

from .network import Measured, measure_network

WAYS: Final = ("live", "1,1", "2,1", "2,2")
AS_GOOD: Final = ("live", "2,2")
"""Of these, those that train what live trains, as far as was measured (docs/log/numbers.md): what ``auto`` takes."""
_HEAD_PASSES: Final = 3
"""What the loss with its gradient takes of the loss alone: the head's matrix is gone through once more each way."""

_NOTICEABLE_S: Final = 0.5


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """A mean step, all adapters active.

    Attributes:
        passes: as ``--passes`` has it.
        round_trips: that it waits for, one after the other; mb: that cross, both ways.
        network_s, server_s, device_s: of it.
        as_good: whether ``auto`` may take it.
    """

    passes: str
    round_trips: int
    mb: float
    network_s: float
    server_s: float
    device_s: float
    as_good: bool

    @property
    def seconds(self) -> float:
        """All of a step."""
        return self.network_s + self.server_s + self.device_s


def ways_of(config: Resolved, manifest: Manifest, dataset: Dataset, measured: Measured) -> list[Way]:
    """Each way to ask the adapters of a run in ``split``."""
    return [_way(_in_passes(config, passes), manifest, dataset, measured) for passes in WAYS]


def _way(config: Resolved, manifest: Manifest, dataset: Dataset, measured: Measured) -> Way:
    traffic = mean_step_traffic(config, manifest, dataset)
    nbytes = traffic.bytes_up + traffic.bytes_down
    steps = steps_an_epoch(len(dataset), config.examples_a_step)
    round_trips = -(-traffic.round_trips // min(_together(config, dataset), measured.window))
    tokens, labelled, acting = (
        each / steps for each in (dataset.tokens, dataset.labelled, _acting_rows(config, dataset))
    )
    forward, backward = _passes_above_base(config.passes)
    passed = (forward * (acting if measured.runs_rows else tokens) + backward * acting) * _upper_share(config, manifest)
    passes = config.server.passes
    return Way(
        passes=passes,
        round_trips=round_trips,
        mb=round(nbytes / 1e6, 3),
        network_s=round(round_trips * measured.round_trip_s + nbytes / measured.bytes_per_s, 3),
        server_s=round((tokens + passed) * measured.server_s, 3),
        device_s=round(_HEAD_PASSES * labelled * measured.device_s, 3),
        as_good=passes in AS_GOOD,
    )


def _together(config: Resolved, dataset: Dataset) -> int:
    """How many micro-batches of a mean step may be under way together."""
    steps = steps_an_epoch(len(dataset), config.examples_a_step)
    return min(config.window, -(-len(dataset) // (steps * config.training.batch_size)))


def _acting_rows(config: Resolved, dataset: Dataset) -> float:
    """Rows at which adapters act, of all examples."""
    return len(dataset) * dataset.acting_on_answers(config.invocation).mean_crossing_rows


def _upper_share(config: Resolved, manifest: Manifest) -> float:
    """The share of the blocks from the lowest with an adapter on: others run once."""
    lowest = min(group.block for group in config.groups(manifest))
    return 1 - lowest / manifest.base_model.blocks


def _passes_above_base(passes: Passes | None) -> tuple[int, int]:
    """How often these rows go through these blocks beside the base pass, forward and backward. Weights are frozen, so
    that a backward pass takes as long as a forward pass."""
    return (0, 1) if passes is None else (passes.forward, passes.backward)


def fastest(ways: Sequence[Way]) -> Way:
    """The one that takes the least time of those that are as good."""
    return min((way for way in ways if way.as_good), key=lambda way: way.seconds)


def advice(own: Way, ways: Sequence[Way], measured: Measured) -> str | None:
    """A line where one of ``ways`` would take less than half of the run's own; None where none does."""
    best = fastest(ways)
    if 2 * best.seconds >= own.seconds:
        return None
    return (
        f"the server is far ({measured.words}): a step takes about {own.seconds:.1f} s, {own.round_trips} round trips; "
        f"with --passes {best.passes} about {best.seconds:.1f} s, {best.round_trips} round trips"
    )


def choose_passes(
    config: Resolved,
    bundle: Bundle,
    dataset: Dataset,
    connecting: ConnectSettings,
    init: LoadedAdapter | None,
    round_trip_s: float,
    *,
    is_asked: bool,
    say: Callable[[str], None],
) -> Resolved:
    """``config``, with the fastest way in place of its own where that ``is_asked`` for; else another that is much
    faster is only said, where the server is far enough to look.

    Args:
        init: the adapter to start from: it is trained as it was, or live.
        round_trip_s: that a ping took; 0: nobody has asked.

    Raises what ``Connection`` raises, where it ``is_asked`` for.
    """
    manifest = bundle.manifest
    if config.device_blocks or not (is_asked or _is_worth_a_look(config, manifest, dataset, round_trip_s)):
        return config
    try:
        measured = measure_network(bundle, config, connecting)
    except DloraError:
        if is_asked:
            raise
        return config  # what is wrong, the run itself will say
    ways = [way for way in ways_of(config, manifest, dataset, measured) if init is None or _can_go_on(init, way)]
    if not is_asked:
        if line := advice(_way(config, manifest, dataset, measured), ways, measured):
            say(line)
        return config
    best = fastest(ways)
    say(
        f"how adapters are asked: --passes {best.passes} (auto): about {best.seconds:.1f} s a step, "
        f"{best.round_trips} round trips ({measured.words})"
    )
    chosen = _in_passes(config, best.passes)
    if chosen.passes is None:  # nothing is kept, and a run that goes on would refuse to be told how
        bare = msgspec.structs.replace(chosen.placement, cache_mb=None, cache_key_file=None)
        return msgspec.structs.replace(chosen, placement=bare)
    return with_kept_reads(chosen, manifest, dataset)


def _is_worth_a_look(config: Resolved, manifest: Manifest, dataset: Dataset, round_trip_s: float) -> bool:
    """Whether round trips are so much of a step that measuring all the rest, about a second, is soon repaid."""
    least = mean_step_traffic(_in_passes(config, "1,1"), manifest, dataset).round_trips
    more = mean_step_traffic(config, manifest, dataset).round_trips - least
    return more / _together(config, dataset) * round_trip_s > _NOTICEABLE_S


def _can_go_on(init: LoadedAdapter, way: Way) -> bool:
    try:
        check_passes(init, way.passes)
    except CheckpointError:
        return False
    return True


def _in_passes(config: Resolved, passes: str) -> Resolved:
    return msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, passes=passes))
