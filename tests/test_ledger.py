"""What servers count together: the same rules for a ledger in memory, in Valkey, and for two servers at one."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import conversations
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from processes import run_cloud
from serving import RawDevice, greeted_device, serving
from tiny import TinyFactory
from valkeys import Valkey, valkey_server
from waiting import StandingClock, eventually

from dlora.cloud.admission.access import Access, AccessDeniedError
from dlora.cloud.admission.ledger import Ledger, MemoryLedger, QuotaLimits
from dlora.cloud.admission.quotas import Charge, Quotas, SessionQuota
from dlora.cloud.admission.tokens import BearerTokenStore
from dlora.cloud.admission.trusted_proxies import Origin
from dlora.cloud.admission.valkey_ledger import ASK_AGAIN_S, LEASE_S, ValkeyLedger
from dlora.cloud.model.base_model import BaseModel
from dlora.edge.wire.connecting import ConnectSettings
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.credentials import Credentials
from dlora.protocol import messages as m
from dlora.protocol.errors import RefusedError, StorageError, UsageError
from dlora.protocol.messages import ErrorCode

HERE = Origin("192.0.2.7")


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with tempfile.TemporaryDirectory() as directory, valkey_server(Path(directory)) as running:
        yield running


def refused(call: Callable[[], object]) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value


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
    """Callers at one server or several: sessions, tokens and compute count over all, memory for each."""

    idle = Bundle("idle")
    running = Bundle("running")

    def __init__(self, make_ledgers: Callable[[StandingClock], list[Ledger]]) -> None:
        super().__init__()
        self.clock = StandingClock()
        self.servers = [Quotas(LIMITS, ledger) for ledger in make_ledgers(self.clock)]
        self.models = {"a": Model(), "b": Model()}
        self.opened: list[SessionQuota] = []
        self.charges: dict[int, Charge] = {}
        self.prefix = uuid.uuid4().hex  # a Valkey remembers the examples before

    def teardown(self) -> None:
        for quotas in self.servers:
            quotas.ledger.close()

    def live_at(self, session: SessionQuota) -> int:
        model = self.models[session.name[-1]]
        at_server = {id(each) for each in self.opened if each._quotas is session._quotas}
        return sum(nbytes for each, nbytes in model.live.items() if each in at_server)

    @rule(target=idle, name=NAMES, server=st.integers(0, 1))
    def open(self, name: str, server: int) -> SessionQuota | None:
        quotas, model = self.servers[server % len(self.servers)], self.models[name]
        if len(model.open) == 3:
            assert refused(lambda: quotas.open_session(self.prefix + name)).code == ErrorCode.QUOTA_SESSIONS
            return None
        session = quotas.open_session(self.prefix + name)
        model.open.add(id(session))
        model.live[id(session)] = 0
        self.opened.append(session)
        return session

    @rule(seconds=st.floats(0.0, 90.0))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        for quotas in self.servers:
            quotas.keep_sessions()
        self.settle()

    @rule(target=running, session=consumes(idle), tokens=st.integers(1, 130), live_bytes=st.integers(0, 110))
    def begin(self, session: SessionQuota | None, tokens: int, live_bytes: int) -> SessionQuota | None:
        """Begin; where refused for now, wait as told and begin again, which must do once the memory is there."""
        if session is None:
            return None
        if tokens > 120 or live_bytes > 100:
            assert not refused(lambda: session.charge(tokens, live_bytes)).retryable
            return session
        model, now = self.models[session.name[-1]], self.clock.now
        missing = {
            ErrorCode.QUOTA_TOKENS: (used(model.tokens, 2.0, now) + tokens - 120) / 2.0,
            ErrorCode.QUOTA_COMPUTE: (used(model.compute, 1 / 60, now) - 60) * 60,
            ErrorCode.QUOTA_LIVE_BYTES: 5.0 if live_bytes and self.live_at(session) + live_bytes > 100 else 0.0,
        }
        longest = max(missing.values())
        if longest > 1e-3:
            error = refused(lambda: session.charge(tokens, live_bytes))
            self.settle()
            assert error.retryable
            assert error.retry_after_s == pytest.approx(longest, abs=2e-3)
            assert missing[ErrorCode(error.code)] == pytest.approx(longest, abs=2e-3)
            self.wait(error.retry_after_s or 0.0)
            if missing[ErrorCode.QUOTA_LIVE_BYTES]:
                return session
        elif longest > -1e-3:
            self.wait(0.01)  # too close to call
        self.charges[id(session)] = session.charge(tokens, live_bytes)
        model.tokens.append((self.clock.now, tokens))
        model.live[id(session)] = live_bytes
        return session

    @rule(target=idle, session=consumes(running), compute_s=st.floats(0.0, 40.0))
    def end(self, session: SessionQuota | None, compute_s: float) -> SessionQuota | None:
        if session is not None and id(session) in self.charges:
            self.charges.pop(id(session)).end(compute_s)
            self.settle()
            self.models[session.name[-1]].compute.append((self.clock.now, compute_s))
            self.models[session.name[-1]].live[id(session)] = 0
        return session

    @rule(session=consumes(idle))
    def close(self, session: SessionQuota | None) -> None:
        if session is not None:
            session.close()
            session.close()
            self.settle()
            self.models[session.name[-1]].open.remove(id(session))
            del self.models[session.name[-1]].live[id(session)]

    def settle(self) -> None:
        """What nobody waits for is through."""
        for quotas in self.servers:
            if isinstance(quotas.ledger, ValkeyLedger):
                quotas.ledger._later.submit(int).result()

    @invariant()
    def all_hold_the_same(self) -> None:
        for name, model in self.models.items():
            found = [quotas._callers.get(self.prefix + name) for quotas in self.servers]
            callers = [caller for caller in found if caller is not None]
            assert sum(caller.sessions for caller in callers) == len(model.open)
            assert sum(caller.live_bytes for caller in callers) == sum(model.live.values())


def hold_against_the_model(make_ledgers: Callable[[StandingClock], list[Ledger]], draws: int) -> None:
    steps = 40
    found = settings(max_examples=draws // steps, stateful_step_count=steps, deadline=None)
    run_state_machine_as_test(lambda: AgainstTheModel(make_ledgers), settings=found)  # type: ignore[no-untyped-call]


def test_a_ledger_in_memory_holds_the_quotas() -> None:
    hold_against_the_model(lambda clock: [MemoryLedger(clock)], 2_400)


def test_a_ledger_in_valkey_holds_the_same_quotas(valkey: Valkey) -> None:
    hold_against_the_model(lambda clock: [ValkeyLedger(valkey.url, clock)], 2_400)


def test_two_servers_hold_one_quota_together(valkey: Valkey) -> None:
    hold_against_the_model(lambda clock: [ValkeyLedger(valkey.url, clock) for _ in range(2)], 10_000)


# -- what several servers share -------------------------------------------------------------------------------


def test_failed_logins_at_two_servers_count_together(valkey: Valkey, tmp_path: Path) -> None:
    with ExitStack() as stack:
        doors = []
        for name in ("one", "two"):
            ledger = stack.enter_context(closing(ValkeyLedger(valkey.url)))
            doors.append(Access(BearerTokenStore(tmp_path / name), required=True, ledger=ledger))
        codes = []
        for number in range(12):
            with pytest.raises(AccessDeniedError) as denied:
                doors[number % 2].admit(None, Origin(f"192.0.2.{number // 12}"))
            codes.append(denied.value.code)
    assert codes == [ErrorCode.TOKEN_MISSING] * 10 + [ErrorCode.TOO_MANY_FAILURES] * 2
    assert 1 <= (denied.value.retry_after_s or 0) <= 60


def test_sessions_of_a_server_that_is_gone_count_no_more(valkey: Valkey) -> None:
    clock, limits = StandingClock(), QuotaLimits(sessions=1)
    with closing(ValkeyLedger(valkey.url, clock)) as gone, closing(ValkeyLedger(valkey.url, clock)) as other:
        Quotas(limits, gone).open_session("phone")
        quotas = Quotas(limits, other)
        refused(lambda: quotas.open_session("phone"))
        clock.now += LEASE_S
        session = quotas.open_session("phone")
        clock.now += LEASE_S / 2
        quotas.keep_sessions()
        clock.now += LEASE_S / 2
        refused(lambda: quotas.open_session("phone"))
        session.close()
        quotas.open_session("phone")


def test_what_a_server_refuses_after_the_ledger_has_counted_it_is_given_back(valkey: Valkey) -> None:
    limits = QuotaLimits(tokens_per_minute=100, live_bytes=10)
    with closing(ValkeyLedger(valkey.url, StandingClock())) as ledger:
        quotas = Quotas(limits, ledger)
        one, other = quotas.open_session("tablet"), quotas.open_session("tablet")
        running = one.charge(40, 10)
        assert refused(lambda: other.charge(60, 1)).code == ErrorCode.QUOTA_LIVE_BYTES
        ledger._later.submit(int).result()
        running.end(0.0)
        other.charge(60, 1)
        assert refused(lambda: one.charge(1, 0)).code == ErrorCode.QUOTA_TOKENS


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path, str, str]:
    """Two servers' directories with the same tokens, a token, and its id."""
    token = BearerTokenStore(tmp_path / "one" / "tokens.sqlite").create("phone", None)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    return tmp_path / "one", tmp_path / "two", token, token.split("_")[1]


def test_a_token_revoked_once_is_refused_by_all_servers(
    tiny: TinyFactory, valkey: Valkey, copies: tuple[Path, Path, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newcomers at once, and open sessions when they are looked at."""
    monkeypatch.setattr("dlora.cloud.serving.server.RECHECK_EVERY_S", 0.05)
    *states, token, _ = copies
    credentials = ConnectSettings(Credentials(token))
    with ExitStack() as stack:
        servers = []
        for state in states:
            ledger = ValkeyLedger(valkey.url)
            access = Access(BearerTokenStore(state / "tokens.sqlite"), required=True, ledger=ledger)
            servers.append(stack.enter_context(serving(tiny().base, access=access, ledger=ledger)))
        devices = [stack.enter_context(opened_session(server.url, tiny().base, token)) for server in servers]
        assert run_cloud("token", "revoke", "phone", "--state-dir", states[0], "--ledger", valkey.url).code == 0
        for server, device in zip(servers, devices, strict=True):
            with pytest.raises(RefusedError, match="revoked"):
                Connection(server.url, credentials)
            assert device.hear_error().code == ErrorCode.TOKEN_REVOKED


@contextmanager
def opened_session(url: str, base: BaseModel, token: str) -> Iterator[RawDevice]:
    with greeted_device(url, token) as device:
        groups = base.groups(["model.layers.0.self_attn.q_proj"])
        device.say(conversations.open_session(base_fingerprint=base.fingerprint, groups=groups))
        assert isinstance(device.hear(), m.SessionOpened)
        yield device


def test_a_revocation_can_be_told_again(valkey: Valkey, copies: tuple[Path, Path, str, str]) -> None:
    """Where the ledger was away, the token is revoked here, and the command says that others do not know it."""
    state, _, _, token_id = copies
    told = run_cloud("token", "revoke", token_id, "--state-dir", state, "--ledger", "unix:///nowhere.sock")
    assert told.code == StorageError.exit_code
    assert "cannot tell the ledger" in told.errors[0]
    again = run_cloud("token", "revoke", token_id, "--state-dir", state, DLORA_CLOUD_LEDGER=valkey.url)
    assert (again.code, again.stderr) == (0, f"revoked 1 token of {token_id}\n")
    with closing(ValkeyLedger(valkey.url)) as ledger:
        assert ledger.revoked([token_id, "00000000"]) == {token_id}


# -- where it is away -----------------------------------------------------------------------------------------


def test_what_holds_while_the_ledger_is_killed_and_started_again(
    copies: tuple[Path, Path, str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """No token is let in, quotas refuse nobody, and open sessions stay; then nothing that was told is forgotten."""
    state, _, token, token_id = copies
    bearer, limits = f"Bearer {token}", QuotaLimits(tokens_per_minute=100)
    with tempfile.TemporaryDirectory() as directory, valkey_server(Path(directory)) as valkey:
        ledger, clock = ValkeyLedger(valkey.url), StandingClock()
        ledger._monotonic = clock
        access = Access(BearerTokenStore(state / "tokens.sqlite"), required=True, ledger=ledger)
        caller = access.admit(bearer, HERE)
        session = Quotas(limits, ledger).open_session("phone")
        session.charge(100, 0)
        refused(lambda: session.charge(50, 0))
        ledger.revoke(["11111111"])
        valkey.kill()
        session.charge(100, 0)
        with pytest.raises(AccessDeniedError) as denied:
            access.admit(bearer, HERE)
        assert (denied.value.status, denied.value.retryable) == (503, True)
        assert access.recheck([caller]) == {}
        assert (ledger.errors, ledger.is_up) == (3, False)
        assert len([each for each in caplog.messages if "the ledger does not answer" in each]) == 1
        valkey.start()
        session.charge(100, 0)  # it is not asked again at once

        def revoked() -> set[str]:
            clock.now += ASK_AGAIN_S
            with suppress(StorageError):  # on a busy machine the first answer may come too late
                return ledger.revoked(["11111111", token_id])
            return set()

        eventually(lambda: revoked() == {"11111111"})
        refused(lambda: session.charge(50, 0))
        assert access.admit(bearer, HERE) == caller
        assert ledger.is_up
        ledger.close()


@pytest.mark.parametrize("url", ["localhost", "http://localhost:6379", "valkey://localhost:port"])
def test_what_is_no_ledger_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="--ledger is no address"):
        ValkeyLedger(url)
