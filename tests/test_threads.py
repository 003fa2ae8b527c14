"""Threads that begin when there is work and end when there is none."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future

import pytest
from waiting import eventually

from dlora.cloud.serving.threads import Threads


def running(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_work_begins_at_once_and_threads_end_without_any() -> None:
    """However many pieces of work wait for something; and a thread that is free is used again."""
    threads, go_on = Threads("busy", idle_s=0.05), threading.Event()
    waiting = [threads.submit(go_on.wait, 60) for _ in range(20)]
    eventually(lambda: all(each.running() for each in waiting))
    assert running("busy") == 20
    go_on.set()
    assert all(each.result(60) for each in waiting)
    eventually(lambda: running("busy") == 0)
    assert threads.submit(pow, 2, 3).result(60) == 8
    threads.shutdown()


def test_threads_are_used_again() -> None:
    with Threads("again", idle_s=60.0) as threads:
        for _ in range(50):
            threads.submit(int).result(60)
            eventually(lambda: len(threads._idle) == 1)
        assert running("again") == 1
    assert running("again") == 0


def test_a_thread_that_is_about_to_end_takes_the_work_that_it_is_given() -> None:
    """Again and again at that very moment: nothing is lost."""
    with Threads("ending", idle_s=0.0) as threads:
        assert [threads.submit(int, number).result(60) for number in range(500)] == list(range(500))


def test_each_thread_begins_with_what_it_is_told() -> None:
    begun: list[str] = []
    with Threads("told", lambda: begun.append(threading.current_thread().name)) as threads:
        threads.submit(int).result(60)
    assert begun == ["told"]


def test_errors_reach_whoever_asked_and_nothing_is_kept() -> None:
    class Held:
        pass

    def fail(held: Held) -> None:
        raise ZeroDivisionError

    gc.collect()
    gc.disable()  # it must not take a search for cycles
    try:
        with Threads("failing", idle_s=60.0) as threads:
            held = Held()
            seen = weakref.ref(held)
            failed: Future[None] = threads.submit(fail, held)
            assert isinstance(failed.exception(60), ZeroDivisionError)
            del failed, held
            eventually(lambda: seen() is None)
    finally:
        gc.enable()
    with pytest.raises(RuntimeError, match="shut down"):
        threads.submit(int)
