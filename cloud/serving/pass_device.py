"""The device of a micro-batch in passes: all groups' tensors to it and from it, in pieces."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from dlora.cloud.exchange.differences import Differences
from dlora.cloud.exchange.session_model import SessionModel
from dlora.protocol import messages as m
from dlora.protocol.adapters import Crossing, crossings
from dlora.protocol.passes import MOST_PIECES, pieces, reads_digest
from dlora.protocol.tensors import WireTensor
from dlora.protocol.wire_codecs import Codecs, TensorRole

from .micro_batch_device import MicroBatchDevice

_FEW_BYTES: Final = 1 << 16
"""More pieces may wait for an answer while all together have no more than this: it fits into the buffers of a
connection."""
_MOST_SMALL_PIECES: Final = 32
_KNOWN_BYTES: Final = 4  # of a number of what crosses


def exchanged_bytes(model: SessionModel, live: Collection[int], rows: int) -> int:
    """Of what ``live`` groups read and write in passes, and of its gradients: what both sides know, and what is in
    hand."""
    each = crossings(model.adapter, model.groups)
    widths = sum(4 * each[group].input_width + 5 * sum(each[group].output_widths) for group in live)
    return _KNOWN_BYTES * rows * widths


class PassDevice:
    """Sends what groups read, and the gradients of what they write, and waits for what the device answers to all.

    Args:
        crossings: of each group of the session.
        rows: that cross; dtype: of the tensors that it gives.
        kept_reads: as ``Embeddings`` has it.
        ahead: where the device says that it has what groups read in the first wave: that, or None where it is of other
            tokens.
        sends_early: whether it sends what they write without being asked; with ``kept_reads`` it always does.
    """

    def __init__(
        self,
        device: MicroBatchDevice,
        codecs: Codecs,
        crossings: Sequence[Crossing],
        rows: int,
        dtype: torch.dtype,
        torch_device: torch.device,
        *,
        kept_reads: bytes | None = None,
        ahead: Differences | None = None,
        sends_early: bool = False,
    ) -> None:
        self._kept_reads = kept_reads
        self._sends_early = sends_early or kept_reads is not None
        self._is_ahead = ahead is not None
        self._device = device
        self._crossings = crossings
        self._rows = rows
        self._dtype = dtype
        self._torch_device = torch_device
        places = range(max((len(each.output_widths) for each in crossings), default=0))
        self._inputs = ahead or Differences(codecs, TensorRole.GROUP_INPUT)
        self._deltas = [Differences(codecs, TensorRole.DELTA) for _ in places]
        self._grads = [Differences(codecs, TensorRole.DELTA_GRAD) for _ in places]
        self._input_grads = Differences(codecs, TensorRole.INPUT_GRAD)

    def write(self, reads: Mapping[int, Tensor]) -> dict[int, list[Tensor]]:
        """What the device's adapters give for what these groups read: (rows, output_width) each."""
        found: dict[int, list[Tensor]] = {}

        def take(message: m.GroupDelta) -> int:
            for known, tensor in zip(self._deltas, message.deltas, strict=False):
                values = known.take(message.groups, tensor, self._torch_device)
                for group, each in zip(message.groups, values, strict=True):
                    found.setdefault(group, []).append(each.to(self._dtype))
            return len(message.groups)

        def encode(piece: tuple[int, ...]) -> WireTensor:
            return self._inputs.to_wire(piece, [reads[group] for group in piece])

        encoded: dict[tuple[int, ...], WireTensor] = {}
        if self._sends_early:
            self._sends_early = False
            if not self._is_ahead:
                encoded = {piece: encode(piece) for piece in self._pieces(list(reads))}
            early = self._receive_early(len(reads))
            if self._is_ahead or reads_digest(encoded.values()) == self._kept_reads:
                for message in early:
                    take(message)
                return found
        self._exchange(
            list(reads),
            lambda piece: self._device.send_inputs(piece, encoded.pop(piece) if encoded else encode(piece)),
            lambda: take(self._device.receive(m.GroupDelta)),
        )
        return found

    def _receive_early(self, groups: int) -> list[m.GroupDelta]:
        """What the device has sent of so many groups without waiting to be asked."""
        found: list[m.GroupDelta] = []
        while sum(len(message.groups) for message in found) < groups:
            found.append(self._device.receive(m.GroupDelta))
        return found

    def send_ahead(self, reads: Mapping[int, Tensor]) -> Differences:
        """Send what all groups read, before the device has asked for it; gives what both sides now know."""
        for piece in self._pieces(list(reads)):
            self._device.send_inputs(piece, self._inputs.to_wire(piece, [reads[group] for group in piece]))
        return self._inputs

    def input_grads(
        self, grads: Mapping[int, Sequence[Tensor]], reading: Sequence[int], number: int
    ) -> dict[int, Tensor]:
        """Send the gradients of these groups' outputs; gives those of the inputs of ``reading`` ones."""
        found: dict[int, Tensor] = {}

        def receive() -> int:
            message = self._device.receive(m.GroupInputGrad)
            values = self._input_grads.take(message.groups, message.grad_hidden_states, self._torch_device)
            found.update(zip(message.groups, (each.to(self._dtype) for each in values), strict=True))
            return len(message.groups)

        def send(piece: tuple[int, ...], *, answer: bool = True) -> None:
            columns = zip(*(grads[group] for group in piece), strict=True)
            pairs = zip(self._grads, columns, strict=False)
            tensors = tuple(known.to_wire(piece, column) for known, column in pairs)
            self._device.send_output_grads(piece, tensors, answer=answer, backward_pass=number)

        for piece in self._pieces([group for group in grads if group not in reading]):
            send(piece, answer=False)  # before the others: nobody waits for these
        self._exchange([group for group in grads if group in reading], send, receive)
        return found

    def _exchange(
        self, groups: Sequence[int], send: Callable[[tuple[int, ...]], None], receive: Callable[[], int]
    ) -> None:
        """Send all of these in pieces, and receive as many answers; ``receive`` gives how many groups one is of.

        Not all before the first answer is read: a device reads nothing while it sends, and could not send.
        """
        unanswered: deque[int] = deque()  # bytes of each group
        pieces_sent = 0
        for piece in self._pieces(groups):
            nbytes = 4 * self._rows * self._crossings[piece[0]].width
            while unanswered and not _may_send(sum(unanswered) + nbytes * len(piece), pieces_sent):
                pieces_sent -= 1
                for _ in range(receive()):
                    unanswered.popleft()
            send(piece)
            unanswered.extend([nbytes] * len(piece))
            pieces_sent += 1
        left = len(unanswered)
        while left:
            left -= receive()

    def _pieces(self, groups: Sequence[int]) -> list[tuple[int, ...]]:
        return pieces(groups, self._crossings, self._rows)


def _may_send(nbytes: int, pieces_sent: int) -> bool:
    """Whether another piece may be sent, which makes ``nbytes`` without an answer."""
    return pieces_sent < MOST_PIECES or (nbytes <= _FEW_BYTES and pieces_sent < _MOST_SMALL_PIECES)
