"""Threads for what computes or waits in the middle of something: one for each piece of work, for as long as there is
any.

``ThreadPoolExecutor`` keeps as many as it ever had. Here one that has had nothing to do for a while ends, so that a
server with a thousand sessions that think has as many threads as one with none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

IDLE_S: Final = 10.0

_Work = tuple[Future[Any], Callable[[], Any]] | None


class Threads(Executor):
    """Begins work at once, in a thread that has nothing to do or in a new one.

    Args:
        name: of all threads, for whoever looks at the process; begin: what each does first.
        idle_s: seconds without work after which a thread ends.
    """

    def __init__(self, name: str, begin: Callable[[], None] = lambda: None, idle_s: float = IDLE_S) -> None:
        self._name, self._begin, self._idle_s = name, begin, idle_s
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[_Work]] = []  # whoever worked last is asked first, so that the others can end
        self._threads: set[threading.Thread] = set()
        self._is_shut_down = False

    def __len__(self) -> int:
        """How many there are just now."""
        return len(self._threads)

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As ``Executor.submit``."""
        future: Future[T] = Future()
        call: Callable[[], T] = partial(function, *args, **kwargs)
        with self._lock:
            if self._is_shut_down:
                raise RuntimeError("no work any more: these threads are shut down")
            if self._idle:
                queue = self._idle.pop()
            else:
                queue = SimpleQueue()
                thread = threading.Thread(target=self._work, args=(queue,), name=self._name, daemon=True)
                thread.start()
                self._threads.add(thread)
                call = partial(self._begin_and, call)
        queue.put((future, call))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As ``Executor.shutdown``; there is never any work that has not begun."""
        with self._lock:
            self._is_shut_down = True
            idle, self._idle = self._idle, []
            threads = list(self._threads)
        for queue in idle:
            queue.put(None)
        for thread in threads if wait else ():
            thread.join()

    def _work(self, queue: SimpleQueue[_Work]) -> None:
        while (work := self._next(queue)) is not None:
            _run(*work)
            del work  # what it holds must not wait for the next
            with self._lock:
                if self._is_shut_down:
                    break
                self._idle.append(queue)
        with self._lock:
            self._threads.discard(threading.current_thread())

    def _begin_and(self, call: Callable[[], T]) -> T:
        self._begin()
        return call()

    def _next(self, queue: SimpleQueue[_Work]) -> _Work:
        try:
            return queue.get(timeout=self._idle_s)
        except Empty:
            with self._lock:
                if queue in self._idle:
                    self._idle.remove(queue)
                    return None
            return queue.get()  # it was given some just now


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            result = call()
        except BaseException as error:
            future.set_exception(error)
            del future, call  # else the error's own frame, and all that it computed with, would be held by a cycle
        else:
            future.set_result(result)
