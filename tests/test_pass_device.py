"""A wave leaves in pieces, of which some are answered before the last is sent: a device that sends reads nothing."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from dlora.cloud.serving.pass_device import PassDevice
from dlora.protocol import messages as m
from dlora.protocol.adapters import Crossing
from dlora.protocol.wire_codecs import Codecs, encode_floats

GROUPS = 40


class SlowDevice:
    """A micro-batch's device that answers as late as it may."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width
        self.unanswered: deque[tuple[int, ...]] = deque()
        self.most_unanswered = self.pieces = 0

    def send_inputs(self, groups: tuple[int, ...], tensor: Any) -> None:
        self._sent(groups)

    def send_output_grads(self, groups: tuple[int, ...], tensors: Any, *, answer: bool, backward_pass: int) -> None:
        if answer:
            self._sent(groups)

    def _sent(self, groups: tuple[int, ...]) -> None:
        self.pieces += 1
        self.unanswered.append(groups)
        self.most_unanswered = max(self.most_unanswered, len(self.unanswered))

    def receive(self, kind: type[m.ExchangeMessage]) -> m.ExchangeMessage:
        groups = self.unanswered.popleft()
        values = encode_floats(np.full((len(groups) * self.rows, self.width), groups[0], np.float32), "fp32")
        if kind is m.GroupDelta:
            return m.GroupDelta(step=0, micro_batch=0, groups=groups, deltas=(values,))
        return m.GroupInputGrad(step=0, micro_batch=0, groups=groups, grad_hidden_states=values)


@pytest.mark.parametrize(("rows", "width", "most"), [(4096, 64, 3), (2, 4, 32), (64, 16, 16)])
def test_few_pieces_are_without_an_answer_at_a_time(rows: int, width: int, most: int) -> None:
    # Widths that alternate, so that each group is a piece of its own.
    crossings = [Crossing(width, (width,)) if group % 2 else Crossing(width, (width, 0)) for group in range(GROUPS)]
    slow = SlowDevice(rows, width)
    device = PassDevice(slow, Codecs.all("fp32"), crossings, rows, torch.float32, torch.device("cpu"))  # type: ignore[arg-type]
    values = {group: torch.zeros(rows, width) for group in range(GROUPS)}
    written = device.write(values)
    assert written.keys() == values.keys()
    assert all(bool((each == group).all()) for group, (each,) in written.items())
    answered = device.input_grads({group: [each] for group, each in values.items()}, list(range(1, GROUPS)), 0)
    assert answered.keys() == values.keys() - {0}
    assert (slow.most_unanswered, slow.pieces) == (most, 2 * GROUPS - 1)
    assert not slow.unanswered
