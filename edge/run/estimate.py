"""How long a run will take, from a calibration, and how large its largest micro-batch is: estimates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from dlora.edge.data.batches import steps_an_epoch
from dlora.edge.model.trunk import MOST_TOKENS
from dlora.edge.training.config import TrainConfig
from dlora.protocol.adapters import kind_of, parameter_count
from dlora.protocol.manifest import Manifest

from .plan import EvaluationPlan

if TYPE_CHECKING:
    from dlora.edge.data.examples import Dataset

    from .calibration import DeviceSpeed, ServerSpeed

# Of a forward pass through frozen blocks. Weights that are not trained need no gradient: backward is one product for
# each of forward's.
_FORWARD_AND_BACKWARD: Final = 2.0
_FLOPS_A_PARAMETER: Final = 6.0  # and row: forward, and two products backward
_HEAD_FORWARD: Final = 0.5  # of forward and backward
_AT_A_TIME: Final = 4  # micro-batches that are asked for while a cache is filled


def largest_micro_batch(config: TrainConfig, datasets: Sequence[Dataset]) -> int:
    """Tokens of the largest micro-batch that may come up: its longest examples may come together."""
    most = 0
    for dataset in datasets:
        longest = np.sort(dataset.lengths)[::-1][: config.batch_size]
        tokens = int(longest.sum())
        if config.mode != "split":  # where the device cuts them
            tokens = min(tokens, max(MOST_TOKENS, int(longest[0])))
        most = max(most, tokens)
    return most


def minutes_of(
    config: TrainConfig,
    manifest: Manifest,
    dataset: Dataset,
    evaluations: EvaluationPlan | None,
    device: DeviceSpeed | None,
    server: ServerSpeed | None,
    *,
    wire_bytes: float,
    round_trips: int,
) -> float | None:
    """Minutes of the whole run, held-out evaluations among them; None where a speed is not known that it rests on."""
    if device is None or (server is None and config.mode != "local"):
        return None
    per_epoch = steps_an_epoch(len(dataset), config.batch_size * config.grad_accum)
    epochs = config.total_steps / per_epoch
    trained, labelled = epochs * dataset.tokens, epochs * dataset.labelled
    times, evaluated, labels_evaluated = 0, 0.0, 0.0
    if evaluations is not None:
        times = evaluations.count_left(0, config.total_steps)
        evaluated, labels_evaluated = times * evaluations.dataset.tokens, times * evaluations.dataset.labelled
    seconds = device.head_row * (labelled + _HEAD_FORWARD * labels_evaluated)
    if config.mode == "split":
        assert server is not None
        steps = config.total_steps
        if config.basis == "data" and kind_of(config.adapter).server_makes_state:
            steps += config.basis_pass_steps(len(dataset))
        a_step = config.grad_accum * server.forward + server.token * dataset.tokens / per_epoch
        seconds += _FORWARD_AND_BACKWARD * steps * a_step
        if evaluations is not None:
            seconds += times * server.forward * len(evaluations.dataset) / config.batch_size + server.token * evaluated
        numbers = parameter_count(config.adapter, config.groups(manifest))
        seconds += _FLOPS_A_PARAMETER * numbers * (trained + evaluated / 3) / device.flops
        return _with_wire(seconds, server, wire_bytes, round_trips)
    if device.block_forward is None or device.block_backward is None:
        return None
    in_training, in_evaluations = (
        (config.device_blocks - 1 + device.without_label) * tokens + (1 - device.without_label) * labels
        for tokens, labels in ((trained, labelled), (evaluated, labels_evaluated))
    )
    seconds += device.block_forward * (in_training + in_evaluations) + device.block_backward * in_training
    if config.mode == "local":
        return seconds / 60
    assert server is not None
    blocks = manifest.base_model.blocks
    texts, tokens = min(epochs, 1) * len(dataset), min(epochs, 1) * dataset.tokens
    if evaluations is not None:
        texts, tokens = texts + len(evaluations.dataset), tokens + evaluations.dataset.tokens
    passes = texts if config.exact else round_trips  # a pack at once, or each text by itself
    seconds += (server.forward * passes + server.token * tokens) * (blocks - config.device_blocks) / blocks
    return _with_wire(seconds, server, wire_bytes, -(-round_trips // _AT_A_TIME))


def _with_wire(seconds: float, server: ServerSpeed, wire_bytes: float, round_trips: int) -> float:
    """Minutes."""
    return (seconds + wire_bytes / server.bytes_per_s + round_trips * server.round_trip) / 60
