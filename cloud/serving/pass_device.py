"""The device of a micro-batch in passes: all groups' tensors to it and from it, in pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dlora.cloud.exchange.differences import Differences
from dlora.protocol import messages as m
from dlora.protocol.adapters import Crossing
from dlora.protocol.passes import pieces
from dlora.protocol.wire_codecs import Codecs, TensorRole

from .micro_batch_device import MicroBatchDevice


class PassDevice:
    """Sends what groups read, and the gradients of what they write, and waits for what the device answers to all.

    Args:
        crossings: of each group of the session.
        rows: that cross; dtype: of the tensors that it gives.
    """

    def __init__(
        self,
        device: MicroBatchDevice,
        codecs: Codecs,
        crossings: Sequence[Crossing],
        rows: int,
        dtype: torch.dtype,
        torch_device: torch.device,
    ) -> None:
        self._device = device
        self._crossings = crossings
        self._rows = rows
        self._dtype = dtype
        self._torch_device = torch_device
        places = range(max((len(each.output_widths) for each in crossings), default=0))
        self._inputs = Differences(codecs, TensorRole.GROUP_INPUT)
        self._deltas = [Differences(codecs, TensorRole.DELTA) for _ in places]
        self._grads = [Differences(codecs, TensorRole.DELTA_GRAD) for _ in places]
        self._input_grads = Differences(codecs, TensorRole.INPUT_GRAD)

    def write(self, reads: Mapping[int, Tensor]) -> dict[int, list[Tensor]]:
        """What the device's adapters give for what these groups read: (rows, output_width) each."""
        for piece in pieces(list(reads), self._crossings, self._rows):
            self._device.send_inputs(piece, self._inputs.to_wire(piece, [reads[group] for group in piece]))
        found: dict[int, list[Tensor]] = {}
        while len(found) < len(reads):
            message = self._device.receive(m.GroupDelta)
            for known, tensor in zip(self._deltas, message.deltas, strict=False):
                values = known.take(message.groups, tensor, self._torch_device)
                for group, each in zip(message.groups, values, strict=True):
                    found.setdefault(group, []).append(each.to(self._dtype))
        return found

    def input_grads(
        self, grads: Mapping[int, Sequence[Tensor]], reading: Sequence[int], number: int
    ) -> dict[int, Tensor]:
        """Send the gradients of these groups' outputs; gives those of the inputs of ``reading`` ones."""
        for answer in (False, True):  # in this order: what asks for nothing is not waited for
            chosen = [group for group in grads if (group in reading) is answer]
            for piece in pieces(chosen, self._crossings, self._rows):
                columns = zip(*(grads[group] for group in piece), strict=True)
                pairs = zip(self._grads, columns, strict=False)
                tensors = tuple(known.to_wire(piece, column) for known, column in pairs)
                self._device.send_output_grads(piece, tensors, answer=answer, backward_pass=number)
        found: dict[int, Tensor] = {}
        while len(found) < len(reading):
            message = self._device.receive(m.GroupInputGrad)
            values = self._input_grads.take(message.groups, message.grad_hidden_states, self._torch_device)
            found.update(zip(message.groups, (each.to(self._dtype) for each in values), strict=True))
        return found
