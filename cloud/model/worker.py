"""A worker of a tensor-parallel server: a process that multiplies with its rows of the weights.

It knows no model, no session and no device: it is given rows, and then what to multiply them with. So whatever the
server does, it does in one process, and a worker has nothing to follow and nothing to lose. Commands come on standard
input, tensors by ``torch.distributed``. ``workers.py`` starts it; the end of its input ends it.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import BinaryIO, Final, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.nn.functional import linear

from dlora.protocol import interrupts
from dlora.protocol.child import end_with
from dlora.protocol.text import first_line

from .low_bits import LowBitWeight

ANSWER_WITHIN: Final = timedelta(minutes=5)
"""A product of the largest micro-batch takes seconds; who needs longer hangs."""
_LENGTH: Final = struct.Struct("<I")
_ENDS_WITHIN_S: Final = 0.5  # a process whose server was killed


class TensorSpec(msgspec.Struct, frozen=True, array_like=True):
    """A tensor that follows, or is to come; dtype as torch spells it (``bfloat16``)."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Of a tensor that is sent."""
        return cls(tuple(tensor.shape), dtype_name(tensor.dtype))

    def empty(self, device: str | torch.device = "cpu") -> Tensor:
        """Room for it."""
        return torch.empty(self.shape, dtype=getattr(torch, self.dtype), device=device)


class Hold(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Hold rows of one more weight, and what else there is of it: they follow, on the processor.

    ``held``: the rows, or codes and scales of a ``LowBitWeight``; ``bias``: (rows,), where there is one; ``dtype``:
    what is computed in.
    """

    held: tuple[TensorSpec, ...]
    bias: TensorSpec | None
    dtype: str


class Multiply(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Send ``x W^T + bias`` of a weight; x follows, or None: it is what came for the last one."""

    weight: int
    x: TensorSpec | None


class MultiplyBack(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Send ``grad W`` of a weight; grad follows."""

    weight: int
    grad: TensorSpec


class Show(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Send the rows of a weight."""

    weight: int


Command = Hold | Multiply | MultiplyBack | Show


def encode_command(command: Command) -> bytes:
    """As it crosses: its length, and it."""
    encoded = msgspec.msgpack.encode(command)
    return _LENGTH.pack(len(encoded)) + encoded


def dtype_name(dtype: torch.dtype) -> str:
    """As torch spells it, ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def join(rank: int, processes: int, store: str, device: str) -> None:
    """Meet the other processes of the server, at a file that all of them name."""
    # What crosses is nobody else's: the file is in a folder of this user's, and connections are this machine's own,
    # whatever the environment says of other programs.
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        store=FileStore(store, processes), rank=rank, world_size=processes, timeout=ANSWER_WITHIN,
    )  # fmt: skip


class Rows(NamedTuple):
    """Rows of a weight that one process has.

    Attributes:
        held: (rows, in_features); or codes and scales of a ``LowBitWeight``.
        bias: (rows,), where there is one.
        dtype: what is computed in.
    """

    held: Sequence[Tensor]
    bias: Tensor | None
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        """(rows, in_features), in ``dtype``."""
        rows = self.held[0] if len(self.held) == 1 else LowBitWeight(*self.held).weight()
        return rows.to(self.dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """``x W^T + bias``, (…, rows), of x (…, in_features)."""
        return linear(x, self.weight, self.bias)

    def multiply_back(self, grad: Tensor) -> Tensor:
        """``grad W``, (…, in_features), of grad (…, rows)."""
        return grad @ self.weight


class _Worker:
    def __init__(self, device: str) -> None:
        self._device = device
        self._all_rows: list[Rows] = []
        self._x = torch.empty(0)

    def obey(self, command: Command) -> None:
        """Do what a command says, and send what it asks for."""
        match command:
            case Hold(held=specs, bias=bias_spec, dtype=dtype):
                held = [_receive(spec).to(self._device) for spec in specs]
                bias = None if bias_spec is None else _receive(bias_spec).to(self._device)
                self._all_rows.append(Rows(held, bias, getattr(torch, dtype)))
            case Multiply(weight=index, x=x):
                if x is not None:
                    self._x = _receive(x, self._device)
                dist.send(self._all_rows[index].multiply(self._x), 0)
            case MultiplyBack(weight=index, grad=grad):
                dist.send(self._all_rows[index].multiply_back(_receive(grad, self._device)), 0)
            case Show(weight=index):
                dist.send(self._all_rows[index].weight.contiguous(), 0)


def _receive(spec: TensorSpec, device: str = "cpu") -> Tensor:
    tensor = spec.empty(device)
    dist.recv(tensor, 0)
    return tensor


def _commands(stream: BinaryIO) -> Iterator[Command]:
    decoder = msgspec.msgpack.Decoder(Command)
    while length := stream.read(_LENGTH.size):
        yield decoder.decode(stream.read(_LENGTH.unpack(length)[0]))


def main(rank: str, processes: str, store: str, device: str, threads: str, server: str) -> None:
    """Join, and obey until the server ends, whose process id is ``server``."""
    end_with(int(server))
    for number in interrupts.SIGNALS:  # may go to the whole group; the server ends us
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(int(threads))
    if device != "cpu":
        torch.cuda.set_device(device)
    torch.set_grad_enabled(False)
    try:
        print("ready", flush=True)  # the server waits for no file of one that does not start
        os.dup2(2, 1)  # nobody reads what libraries say there
        join(int(rank), int(processes), store, device)
        worker = _Worker(device)
        for command in _commands(sys.stdin.buffer):
            worker.obey(command)
    except Exception as error:
        time.sleep(_ENDS_WITHIN_S)  # where the server was killed we end with it, and there is nobody to tell
        print(f"process {int(rank) + 1}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # threads of the group may still wait for who is gone


if __name__ == "__main__":
    main(*sys.argv[1:])
