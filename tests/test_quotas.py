"""Quotas, against a model that remembers everything, and from many threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from waiting import StandingClock, eventually

from dlora.cloud.admission.quotas import Charge, QuotaLimits, Quotas, SessionQuota
from dlora.protocol.errors import RefusedError, UsageError
from dlora.protocol.messages import ErrorCode


def refused(call: Callable[[], object]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value


def make(**limits: float) -> tuple[Quotas, StandingClock]:
    clock = StandingClock()
    return Quotas(QuotaLimits(**limits), clock), clock  # type: ignore[arg-type]


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
    quotas = Quotas(QuotaLimits(), StandingClock(), total_live_bytes=1000)
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
    quotas = Quotas(QuotaLimits(live_bytes=700), StandingClock(), total_live_bytes=1000)
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


def test_unread_frames_count_in_the_quota() -> None:
    """One finds room in any case, so that a session can always go on; more only where there is room."""
    for quotas in (
        Quotas(QuotaLimits(live_bytes=10**6), StandingClock()),
        Quotas(QuotaLimits(), StandingClock(), total_live_bytes=10**6),
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
    quotas = Quotas(QuotaLimits(), StandingClock(), total_live_bytes=10**6)
    one, other = quotas.open_session("a"), quotas.open_session("b")
    one.sent_ahead = 3
    other.charge(1, 10**6)
    assert [one.add(500_000) for _ in range(4)] == [True, True, True, False]
    one.remove(500_000)
    assert one.add(500_000)


def test_what_a_device_does_not_acknowledge_counts_in_its_quota() -> None:
    quotas = Quotas(QuotaLimits(live_bytes=10**6), StandingClock())
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
    quotas = Quotas(QuotaLimits(), StandingClock(), total_live_bytes=100)
    first, second = quotas.open_session("a"), quotas.open_session("b")
    charge = first.charge(1, 60)
    waiting = threading.Thread(target=second.charge, args=(1, 50))
    waiting.start()
    eventually(lambda: quotas.has_waiting)
    assert second.add(60)
    charge.end(0.0)
    waiting.join(120)
    assert not waiting.is_alive()
    assert quotas.live_bytes == 110


@pytest.mark.parametrize("ending", ["its session", "the server"])
def test_wait_for_memory_ends_when_the_server_stops(ending: str) -> None:
    quotas = Quotas(QuotaLimits(), StandingClock(), total_live_bytes=100)
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
    quotas = Quotas(QuotaLimits(live_bytes=5000), StandingClock())
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
    quotas, clock = make(tokens_per_minute=600)
    staying = quotas.open_session("staying")
    for number in range(1000):
        with quotas.open_session(f"busy {number}") as session:
            session.charge(600, 10).end(1.0)
    assert len(quotas._callers) == 1001
    refused(lambda: quotas.open_session("busy 0").charge(1, 0))
    clock.now += 60.1
    staying.charge(600, 10)
    for number in range(5000):
        quotas.open_session(f"passing {number}").close()
    assert len(quotas._callers) <= 2100
    for number in range(5000):
        quotas.open_session(f"passing again {number}").close()
    assert len(quotas._callers) <= 100
    refused(lambda: staying.charge(1, 0))


@pytest.mark.parametrize("value", [0, -1, float("nan")])
@pytest.mark.parametrize("name", ["sessions", "tokens_per_minute", "live_bytes", "compute_s_per_hour"])
def test_a_limit_is_above_zero(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        QuotaLimits(**{name: value})  # type: ignore[arg-type]


# -- against a model that remembers everything ----------------------------------------------------------------


class Model:
    """What a caller did, as a list; what is left is counted from the beginning every time."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self.live: dict[int, int] = {}
        self.tokens: list[tuple[float, float]] = []
        self.compute: list[tuple[float, float]] = []


def used(events: list[tuple[float, float]], rate: float, now: float) -> float:
    level, at = 0.0, 0.0
    for when, amount in [*events, (now, 0.0)]:
        level = max(0.0, level - (when - at) * rate) + amount
        at = when
    return level


LIMITS = QuotaLimits(sessions=3, tokens_per_minute=120, live_bytes=100, compute_s_per_hour=60.0)
NAMES = st.sampled_from(["a", "b"])


class AgainstTheModel(RuleBasedStateMachine):
    idle = Bundle("idle")
    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.clock = StandingClock()
        self.quotas = Quotas(LIMITS, self.clock)
        self.models = {"a": Model(), "b": Model()}
        self.charges: dict[int, Charge] = {}

    @rule(target=idle, name=NAMES)
    def open(self, name: str) -> SessionQuota | None:
        model = self.models[name]
        if len(model.open) == 3:
            assert refused(lambda: self.quotas.open_session(name)).code == ErrorCode.QUOTA_SESSIONS
            return None
        session = self.quotas.open_session(name)
        model.open.add(id(session))
        model.live[id(session)] = 0
        return session

    @rule(seconds=st.floats(0.0, 90.0))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(target=running, session=consumes(idle), tokens=st.integers(1, 130), live_bytes=st.integers(0, 110))
    def begin(self, session: SessionQuota | None, tokens: int, live_bytes: int) -> SessionQuota | None:
        """Begin; where refused for now, wait as told and begin again, which must do once the memory is there."""
        if session is None:
            return None
        if tokens > 120 or live_bytes > 100:
            assert not refused(lambda: session.charge(tokens, live_bytes)).retryable
            return session
        model, now = self.models[session.name], self.clock.now
        missing = {
            ErrorCode.QUOTA_TOKENS: (used(model.tokens, 2.0, now) + tokens - 120) / 2.0,
            ErrorCode.QUOTA_COMPUTE: (used(model.compute, 1 / 60, now) - 60) * 60,
            ErrorCode.QUOTA_LIVE_BYTES: 5.0 if sum(model.live.values()) + live_bytes > 100 else 0.0,
        }
        longest = max(missing.values())
        if longest > 1e-3:
            error = refused(lambda: session.charge(tokens, live_bytes))
            assert error.retryable
            assert error.retry_after_s == pytest.approx(longest, abs=2e-3)
            assert missing[ErrorCode(error.code)] == pytest.approx(longest, abs=2e-3)
            self.clock.now += error.retry_after_s or 0.0
            if missing[ErrorCode.QUOTA_LIVE_BYTES]:
                return session
        elif longest > -1e-3:
            self.clock.now += 0.01  # too close to call
        self.charges[id(session)] = session.charge(tokens, live_bytes)
        model.tokens.append((self.clock.now, tokens))
        model.live[id(session)] = live_bytes
        return session

    @rule(target=idle, session=consumes(running), compute_s=st.floats(0.0, 40.0))
    def end(self, session: SessionQuota | None, compute_s: float) -> SessionQuota | None:
        if session is not None and id(session) in self.charges:
            self.charges.pop(id(session)).end(compute_s)
            self.models[session.name].compute.append((self.clock.now, compute_s))
            self.models[session.name].live[id(session)] = 0
        return session

    @rule(session=consumes(idle))
    def close(self, session: SessionQuota | None) -> None:
        if session is not None:
            session.close()
            session.close()
            self.models[session.name].open.remove(id(session))
            del self.models[session.name].live[id(session)]

    @invariant()
    def both_hold_the_same(self) -> None:
        for name, caller in self.quotas._callers.items():
            model = self.models[name]
            assert (caller.sessions, caller.live_bytes) == (len(model.open), sum(model.live.values()))


TestAgainstTheModel = AgainstTheModel.TestCase
TestAgainstTheModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


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
    quotas = Quotas(limits, StandingClock(), total_live_bytes=total)
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
