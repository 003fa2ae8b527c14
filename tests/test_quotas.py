"""Quotas, against a model that remembers everything, and from many threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from waiting import StandingClock, eventually

from dlora.cloud.admission.ledger import MemoryLedger, QuotaLimits
from dlora.cloud.admission.quotas import Charge, Quotas, SessionQuota
from dlora.protocol.errors import RefusedError, UsageError
from dlora.protocol.messages import ErrorCode


def refused(call: Callable[[], object]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value


def make(**limits: float) -> tuple[Quotas, StandingClock]:
    clock = StandingClock()
    return Quotas(QuotaLimits(**limits), MemoryLedger(clock)), clock  # type: ignore[arg-type]


# -- one at a time -------------------------------------------------------------------------------------------


def test_without_limits_nothing_is_refused() -> None:
    quotas, _ = make()
    sessions = [quotas.open_session("a") for _ in range(100)]
    for session in sessions:
        session.charge(10**9, 10**15).end(1e9)
        session.charge(10**9, 10**15)


def test_sessions_are_counted_for_each_caller_until_they_close() -> None:
    quotas, _ = make(sessions=2)
    first, _ = quotas.open_session("a"), quotas.open_session("a")
    error = refused(lambda: quotas.open_session("a"))
    assert (error.code, error.retryable, error.retry_after_s) == (ErrorCode.QUOTA_SESSIONS, True, 5.0)
    quotas.open_session("b")
    first.close()
    first.close()
    with quotas.open_session("a"):
        refused(lambda: quotas.open_session("a"))
    quotas.open_session("a")


def test_waiters_for_memory_are_served_in_order() -> None:
    """The second needs more than is free, and the third, which would fit, does not overtake it."""
    quotas = Quotas(QuotaLimits(), total_live_bytes=1000)
    first, second, third = (quotas.open_session(name) for name in "abc")
    charge = first.charge(1, 600)
    begun: dict[str, Charge] = {}

    def begin(session: SessionQuota, live_bytes: int) -> None:
        begun[session.name] = session.charge(1, live_bytes)

    waiting = []
    for session, live_bytes in ((second, 700), (third, 300)):
        waiting.append(threading.Thread(target=begin, args=(session, live_bytes)))
        waiting[-1].start()
        eventually(lambda: len(quotas._line) == len(waiting))
    first.charge(1, 0)  # a report takes none, and waits for nobody
    assert not begun
    charge.end(0.0)
    for thread in waiting:
        thread.join(120)
    assert sorted(begun) == ["b", "c"]
    assert quotas.live_bytes == 1000
    for charge in begun.values():
        charge.end(0.0)
    assert quotas.live_bytes == 0


def test_quota_is_checked_again_after_waiting_for_memory() -> None:
    quotas = Quotas(QuotaLimits(live_bytes=700), total_live_bytes=1000)
    other, one, two = quotas.open_session("b"), quotas.open_session("a"), quotas.open_session("a")
    charge = other.charge(1, 700)
    refusals: list[RefusedError] = []
    waiting = threading.Thread(target=lambda: refusals.append(refused(lambda: one.charge(1, 600))))
    waiting.start()
    eventually(lambda: len(quotas._line) == 1)
    assert two.add(300)  # of the same caller, without waiting
    charge.end(0.0)
    waiting.join(120)
    assert [refusal.code for refusal in refusals] == [ErrorCode.QUOTA_LIVE_BYTES]
    assert not quotas._line


def test_what_is_too_large_says_what_would_help() -> None:
    session = Quotas(QuotaLimits(live_bytes=1000)).open_session("a")
    session.hold(300)
    for micro_batch, advice in ((800, "lower --batch-size"), (1100, "lower --batch-size")):
        assert advice in str(refused(lambda size=micro_batch: session.charge(1, size)))
    session.hold(500)
    assert "lower --rank, or train fewer --blocks, or have the server started" in str(
        refused(lambda: session.charge(1, 300))
    )


def test_unread_frames_count_in_the_quota() -> None:
    """One finds room in any case, so that a session can always go on; more only where there is room."""
    for quotas in (
        Quotas(QuotaLimits(live_bytes=10**6)),
        Quotas(QuotaLimits(), total_live_bytes=10**6),
    ):
        one, other = quotas.open_session("a"), quotas.open_session("a")
        charge = other.charge(1, 900_000)
        assert one.add(2000)
        assert one.add(500_000)
        assert quotas.live_bytes == 1_402_000
        assert not one.add(1)
        one.remove(500_000)
        assert one.add(500_000)
        charge.end(0.0)
        assert one.add(498_000)
        assert not one.add(1)
        one.remove(1_000_000)
        assert quotas.live_bytes == 0
        other.charge(1, 10**6)


def test_as_many_frames_as_a_device_may_send_unread_find_room() -> None:
    quotas = Quotas(QuotaLimits(), total_live_bytes=10**6)
    one, other = quotas.open_session("a"), quotas.open_session("b")
    one.sent_ahead = 3
    other.charge(1, 10**6)
    assert [one.add(500_000) for _ in range(4)] == [True, True, True, False]
    one.remove(500_000)
    assert one.add(500_000)


def test_what_a_device_does_not_acknowledge_counts_in_its_quota() -> None:
    quotas = Quotas(QuotaLimits(live_bytes=10**6))
    session, a_little = quotas.open_session("a"), 64 << 10
    for kept in (300_000, 700_000, 600_000):
        session.count_kept(a_little + kept)
        assert quotas.live_bytes == kept
    assert refused(lambda: session.charge(1, 500_000)).retryable
    session.charge(1, 400_000).end(0.0)
    session.count_kept(a_little)
    session.charge(1, 10**6).end(0.0)
    session.close()
    session.count_kept(10**6)
    assert quotas.live_bytes == 0


def test_frames_of_waiting_sessions_do_not_block_others() -> None:
    """And the time for which they wait is counted."""
    clock = StandingClock()
    quotas = Quotas(QuotaLimits(), total_live_bytes=100, clock=clock)
    first, second = quotas.open_session("a"), quotas.open_session("b")
    charge = first.charge(1, 60)
    waiting = threading.Thread(target=second.charge, args=(1, 50))
    waiting.start()
    eventually(lambda: quotas.has_waiting)
    assert second.add(60)
    clock.now += 7.0
    charge.end(3.0)
    waiting.join(120)
    assert not waiting.is_alive()
    assert quotas.live_bytes == 110
    assert (quotas.memory_waited_s, quotas.computed_s) == (7.0, 3.0)


@pytest.mark.parametrize("ending", ["its session", "the server"])
def test_wait_for_memory_ends_when_the_server_stops(ending: str) -> None:
    quotas = Quotas(QuotaLimits(), total_live_bytes=100)
    first, second = quotas.open_session("a"), quotas.open_session("b")
    first.charge(1, 60)
    refusals: list[RefusedError] = []
    waiting = threading.Thread(target=lambda: refusals.append(refused(lambda: second.charge(1, 50))))
    waiting.start()
    eventually(lambda: quotas.has_waiting)
    if ending == "the server":
        quotas.stop()
    else:
        second.close()
    waiting.join(120)
    assert [(refusal.code, refusal.retryable) for refusal in refusals] == [(ErrorCode.BUSY, True)]
    assert quotas.live_bytes == 60


def test_a_report_is_not_refused_for_memory() -> None:
    """It takes none, and what waits behind it may be more than the quota has left."""
    quotas = Quotas(QuotaLimits(live_bytes=5000))
    one, other = quotas.open_session("a"), quotas.open_session("a")
    other.charge(1, 4000)
    assert one.add(3000)
    one.charge(0, 0)
    assert refused(lambda: one.charge(1, 1)).code == ErrorCode.QUOTA_LIVE_BYTES


def test_live_bytes_count_over_all_sessions_until_the_micro_batch_ends() -> None:
    quotas, _ = make(live_bytes=1000)
    one, other = quotas.open_session("a"), quotas.open_session("a")
    charge = one.charge(1, 600)
    error = refused(lambda: other.charge(1, 401))
    assert (error.code, error.retryable) == (ErrorCode.QUOTA_LIVE_BYTES, True)
    other.charge(1, 400).end(0.0)
    one.close()  # its thread has yet to let go of the graph
    refused(lambda: other.charge(1, 401))
    charge.end(0.0)
    other.charge(1, 1000)


def test_callers_without_usage_are_forgotten() -> None:
    quotas, clock = make(tokens_per_minute=600, sessions=1)
    staying = quotas.open_session("staying")
    for number in range(1000):
        with quotas.open_session(f"busy {number}") as session:
            session.charge(600, 10).end(1.0)
    assert len(quotas.ledger._accounts) == 1001  # type: ignore[attr-defined]
    refused(lambda: quotas.open_session("busy 0").charge(1, 0))
    clock.now += 60.1
    staying.charge(600, 10)
    for number in range(5000):
        quotas.open_session(f"passing {number}").close()
    assert len(quotas.ledger._accounts) <= 2100  # type: ignore[attr-defined]
    for number in range(5000):
        quotas.open_session(f"passing again {number}").close()
    assert len(quotas.ledger._accounts) <= 100  # type: ignore[attr-defined]
    assert list(quotas._callers) == ["staying", "busy 0"]
    refused(lambda: staying.charge(1, 0))


@pytest.mark.parametrize("value", [0, -1, float("nan")])
@pytest.mark.parametrize("name", ["sessions", "tokens_per_minute", "live_bytes", "compute_s_per_hour"])
def test_a_limit_is_above_zero(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        QuotaLimits(**{name: value})  # type: ignore[arg-type]


# -- from many threads ----------------------------------------------------------------------------------------


@pytest.fixture
def frequent_thread_switches() -> Iterator[None]:
    """Threads that take turns so often that what is not locked comes apart."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("frequent_thread_switches")
def test_threads_never_hold_more_than_the_quota_together() -> None:
    quotas, _ = make(sessions=4, live_bytes=100, tokens_per_minute=20_000)
    held: set[SessionQuota] = set()
    together = threading.Barrier(8)

    def work(_: int) -> tuple[int, int]:
        """Tokens that were granted, and the most micro-batches that were seen under way."""
        granted = most = 0
        together.wait(120)
        while True:
            try:
                with quotas.open_session("a") as session:
                    charge = session.charge(7, 40)
                    held.add(session)
                    most = max(most, len(held))
                    held.remove(session)
                    granted += 7
                    charge.end(0.0)
            except RefusedError as error:
                if error.code == ErrorCode.QUOTA_TOKENS:
                    return granted, most

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(work, range(8)))
    assert sum(granted for granted, _ in results) == 19_999  # the clock stands: the minute's and no more
    assert max(most for _, most in results) <= 2
    with quotas.open_session("a") as session:
        session.charge(1, 100)
        refused(lambda: session.charge(1, 0))


# -- what is kept for a session --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "taken", "code", "retryable"),
    [
        ({"live_bytes": 100}, 0, ErrorCode.QUOTA_LIVE_BYTES, False),
        ({"live_bytes": 200}, 100, ErrorCode.QUOTA_LIVE_BYTES, True),
        ({"total": 100}, 0, ErrorCode.LIMIT, False),
        ({"total": 200}, 100, ErrorCode.BUSY, True),
    ],
)
def test_what_is_kept_is_refused_for_good_only_where_it_never_fits(
    limit: dict[str, int], taken: int, code: str, retryable: bool
) -> None:
    limits, total = QuotaLimits(live_bytes=limit.get("live_bytes")), limit.get("total")
    quotas = Quotas(limits, total_live_bytes=total)
    other, session = quotas.open_session("a"), quotas.open_session("a")
    charge = other.charge(1, taken)
    session.hold(90)
    error = refused(lambda: session.hold(20))
    assert (error.code, error.retryable) == (code, retryable)
    assert quotas.live_bytes == taken + 90
    charge.end(0.0)
    if retryable:
        session.hold(20)


def test_nothing_is_kept_for_a_session_that_was_closed() -> None:
    """Its thread may still be making it: nobody would free it."""
    quotas, _ = make()
    session = quotas.open_session("a")
    session.hold(10)
    session.close()
    assert refused(lambda: session.hold(10)).retryable
    assert quotas.live_bytes == 0
