"""The other processes of a tensor-parallel server, each with its rows of the divided weights.

A product ``x W^T`` has a column for each row of W. So each process is sent x, multiplies with its rows, and the columns
are put side by side. On the way back each is sent its columns of the gradient, and what they give is added, in the
order of the processes. All else, attention too, is computed here: sessions, and what is exchanged with devices, are as
in a server of one process. Whatever a family computes, it can be divided, for only linear modules are.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from dlora.protocol import messages as m
from dlora.protocol.errors import RefusedError
from dlora.protocol.text import first_line

from .worker import Command, Hold, Multiply, MultiplyBack, Rows, Show, TensorSpec, dtype_name, encode_command, join

_END_WITHIN_S: Final = 5.0
_NOTICED_WITHIN_S: Final = 1.0  # that a process has ended, once it does not answer


class WorkerLostError(RefusedError):
    """A process of the server has ended, or does not answer."""

    exit_code = 1

    def __init__(self, what: str) -> None:
        text = f"{what}; once the server is started again runs go on with their tickets"
        super().__init__(text, m.ErrorCode.SHUTTING_DOWN, retryable=True)


class Workers:
    """Starts the other processes, and multiplies with what they hold. One of it in a process.

    Args:
        processes: how many there are with this one.
        device: ``cpu``, or ``cuda``: a GPU for each, from cuda:0 on.
        threads: torch threads of each.

    Attributes:
        processes: of the arguments.
        lost: what ended the first that did.

    Raises ``WorkerLostError`` where one does not start, and from all that needs them.
    """

    def __init__(self, processes: int, *, device: str = "cpu", threads: int = 1) -> None:
        self.processes = processes
        self.lost: WorkerLostError | None = None
        self._on_lost: Callable[[WorkerLostError], None] = lambda _: None
        self._noticed = threading.Event()
        self._losing = threading.Lock()
        self._closed = False
        self._lock = threading.RLock()  # what crosses for one product is not mixed with another's
        self._weights = 0
        self._last_x: tuple[weakref.ref[Tensor], int] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="dlora-workers-")
        store = str(Path(self._folder.name) / "store")
        self._workers = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", "dlora.cloud.model.worker", str(rank), str(processes), store,
                 device if device == "cpu" else f"cuda:{rank}", str(threads), str(os.getpid())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )
            for rank in range(1, processes)
        ]  # fmt: skip
        for rank, worker in enumerate(self._workers, 1):
            threading.Thread(target=self._wait_for_end, args=(rank, worker), daemon=True).start()
        atexit.register(self.close)
        with self._crossing():
            for worker in self._workers:
                assert worker.stdout is not None
                if not worker.stdout.readline():
                    raise EOFError
            join(0, processes, store, device)

    def call_when_lost(self, function: Callable[[WorkerLostError], None]) -> None:
        """Call it, in some thread, once a process is lost; at once where one is."""
        self._on_lost = function
        if self.lost is not None:
            function(self.lost)

    def close(self) -> None:
        """End them; this process does so when it ends."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for worker in self._workers:
            assert worker.stdin is not None
            with contextlib.suppress(OSError):
                worker.stdin.close()
        until = time.monotonic() + _END_WITHIN_S
        for worker in self._workers:
            try:
                worker.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
            assert worker.stdout is not None
            worker.stdout.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()

    def hold(self, parts: Sequence[Sequence[Tensor]], biases: Sequence[Tensor | None], dtype: torch.dtype) -> int:
        """Give each worker its rows of a weight, as ``Hold`` has them; its number."""
        with self._lock, self._crossing():
            for rank, (held, bias) in enumerate(zip(parts, biases, strict=True), 1):
                sent = [each.contiguous() for each in (*held, *([] if bias is None else [bias]))]
                specs = tuple(TensorSpec.of(each) for each in held)
                self._tell(rank, Hold(specs, None if bias is None else TensorSpec.of(bias), dtype_name(dtype)))
                for each in sent:
                    dist.send(each, rank)
        self._weights += 1
        return self._weights - 1

    def multiply(self, weight: int, x: Tensor, widths: Sequence[int], own: Rows) -> Tensor:
        """``x W^T + bias``, (…, out_features), of x (…, in_features).

        Args:
            widths: how many rows each worker has.
            own: the rows that are here.
        """
        flat = x.reshape(-1, x.shape[-1])
        with self._lock:
            # Modules that share an input are called one after the other with the same tensor.
            is_last = self._last_x is not None and self._last_x[0]() is x and self._last_x[1] == x._version
            spec = None if is_last else TensorSpec.of(flat)
            sent = [[] if is_last else [flat.contiguous()]] * len(widths)
            shapes = [(len(flat), width) for width in widths]
            self._last_x = None  # until it has crossed
            with self._asking([Multiply(weight, spec)] * len(widths), sent, shapes, x) as columns:
                columns.insert(0, own.multiply(flat))
            self._last_x = weakref.ref(x), x._version
        # The shape first: autograd would have to copy a view.
        return torch.cat([each.view(*x.shape[:-1], -1) for each in columns], -1)

    def multiply_back(self, weight: int, grad: Tensor, widths: Sequence[int], in_features: int, own: Rows) -> Tensor:
        """``grad W``, (…, in_features), of grad (…, out_features). Arguments as of ``multiply``."""
        flat = grad.reshape(-1, grad.shape[-1])
        first, *others = flat.split([flat.shape[-1] - sum(widths), *widths], -1)
        with self._lock:
            commands = [MultiplyBack(weight, TensorSpec.of(each)) for each in others]
            shapes = [(len(flat), in_features)] * len(widths)
            with self._asking(commands, [[each.contiguous()] for each in others], shapes, grad) as terms:
                total = own.multiply_back(first)
        for term in terms:
            total += term
        return total.view(*grad.shape[:-1], -1)

    def show(self, weight: int, widths: Sequence[int], own: Rows) -> Tensor:
        """A whole weight, (out_features, in_features)."""
        first = own.weight
        with self._lock:
            shapes = [(width, first.shape[1]) for width in widths]
            with self._asking([Show(weight)] * len(widths), [[]] * len(widths), shapes, first) as rows:
                rows.insert(0, first)
        return torch.cat(rows)

    @contextmanager
    def _asking(
        self, commands: Sequence[Command], sent: Sequence[Sequence[Tensor]], shapes: Sequence[tuple[int, int]],
        like: Tensor,
    ) -> Iterator[list[Tensor]]:  # fmt: skip
        """Ask each worker; at the end of the context the answers are there, whatever happens inside."""
        answers = [like.new_empty(shape) for shape in shapes]
        under_way: list[dist.Work | None] = []
        with self._crossing():
            for rank, (command, tensors) in enumerate(zip(commands, sent, strict=True), 1):
                self._tell(rank, command)
                under_way += [dist.isend(each, rank) for each in tensors]
            under_way += [dist.irecv(each, rank) for rank, each in enumerate(answers, 1)]
        try:
            yield answers
        finally:
            with self._crossing():
                for work in under_way:
                    if work is not None:
                        work.wait()

    def _tell(self, rank: int, command: Command) -> None:
        stream = self._workers[rank - 1].stdin
        assert stream is not None
        stream.write(encode_command(command))
        stream.flush()

    @contextmanager
    def _crossing(self) -> Iterator[None]:
        """What fails within is a lost process."""
        if self.lost is not None:
            raise self.lost
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            if not self._noticed.wait(_NOTICED_WITHIN_S):
                self._lose(f"a process of the server does not answer ({type(error).__name__}: {first_line(error)})")
            assert self.lost is not None
            raise self.lost from None

    def _wait_for_end(self, rank: int, worker: subprocess.Popen[bytes]) -> None:
        code = worker.wait()
        if not self._closed:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._lose(f"process {rank + 1} of the {self.processes} of the server ended ({how})")

    def _lose(self, what: str) -> None:
        with self._losing:
            if self.lost is not None:
                return
            self.lost = WorkerLostError(what)
        self._noticed.set()
        self._on_lost(self.lost)
