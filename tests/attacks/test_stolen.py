"""Tickets and tokens in wrong hands, or out of date: what they open, and for how long. And clocks that are set."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import conversations
import pytest
from families import VOCABULARY
from msgspec import structs
from serving import KEY, RunningServer, config, final_weights, greeted_device, random_dataset, serving, training
from tiny import Tiny, TinyFactory
from waiting import eventually

from dlora.cloud.admission.access import FAILURES_PER_WINDOW, Access, AccessDeniedError
from dlora.cloud.admission.ledger import QuotaLimits
from dlora.cloud.admission.quotas import Quotas
from dlora.cloud.admission.tokens import BearerTokenStore
from dlora.cloud.admission.trusted_proxies import Origin
from dlora.cloud.serving import server as cloud_server
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.credentials import Credentials
from dlora.protocol import messages as m
from dlora.protocol.errors import RefusedError

STEPS = 4
RUN = config(total_steps=STEPS, kill_revive={"active_fraction": 0.5, "warmup_steps": 0})
YEAR_S = 366 * 86_400.0
WALL_CLOCK = re.compile(r"\btime\.(time|gmtime|localtime)\b|from time import|\bdatetime\.(now|today|utcnow)\b")
MAY_READ_IT = {  # on the device for dates that are shown, and beside the times of files
    "cloud": {"admission/tokens.py", "commands/tokens.py"},
    "edge": {
        "report/tensorboard.py",
        "data/chat.py",
        "endpoint/formats.py",
        "endpoint/responses.py",
        "engine/checked_files.py",
    },
    "protocol": set(),
}


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny(head_dtype="fp32")


@pytest.fixture
def tokens(tmp_path: Path) -> BearerTokenStore:
    return BearerTokenStore(tmp_path / "tokens.sqlite")


@pytest.fixture
def checks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_server, "RECHECK_EVERY_S", 0.01)


def answer(url: str, token: str, opening: m.OpenSession) -> m.AnyMessage:
    """What a server says to an opening."""
    with greeted_device(url, token) as device:
        device.say(opening)
        return device.hear()


@contextmanager
def device(model: Tiny, url: str, token: str, retry: Retry | None = None) -> Iterator[Trainer]:
    connecting = ConnectSettings(credentials=Credentials(token=token), retry=retry or Retry())
    with training(model.bundle, url, RUN, random_dataset(VOCABULARY), connecting) as trainer:
        yield trainer


def bits(trainer: Trainer) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in final_weights(trainer).items()}


def with_purpose(opening: m.OpenSession, **changes: object) -> m.OpenSession:
    return structs.replace(opening, purpose=structs.replace(opening.purpose, **changes))


# -- tickets ---------------------------------------------------------------------------------------------


def test_a_stolen_ticket_gives_nothing_but_the_runs_own_states(model: Tiny, tokens: BearerTokenStore) -> None:
    """Every replica takes it, several at once and from any device that is let in, and nobody else does. Whoever has it
    learns which units are active; the run that it was taken from ends as if nothing were."""
    phone, other = tokens.create("phone", None), tokens.create("other", None)
    access = {"access": Access(tokens, required=True)}
    with serving(model.base, **access) as one, device(model, one.url, phone) as trainer:
        for _ in range(STEPS):
            trainer.run_step()
        undisturbed = bits(trainer)
    with (
        serving(model.base, **access) as one,
        serving(model.base, **access) as replica,
        serving(model.base, ticket_key=KEY[::-1], **access) as foreign,
        device(model, one.url, phone) as trainer,
    ):
        for _ in range(2):
            trainer.run_step()
        trainer.wait_for_signal()
        opened, ticket = trainer.side.crossed.session.opened_with, trainer.session.ticket
        assert opened is not None
        assert ticket is not None
        opening = with_purpose(opened, ticket=ticket, next_step=2, learnt=())
        with greeted_device(one.url, other) as first, greeted_device(replica.url, other) as second:
            for each in (first, second):
                each.say(opening)
            found = [each.hear() for each in (first, second)]
        assert all(isinstance(each, m.SessionOpened) for each in found), found
        assert len({each.units.data.tobytes() for each in found}) == 1
        refused: list[tuple[RunningServer, m.OpenSession]] = [
            (foreign, opening),
            (replica, with_purpose(opening, next_step=1)),  # an old one, to be paid by the same step again
            (replica, with_purpose(opening, next_step=3)),
            (replica, with_purpose(opening, total_steps=STEPS + 1)),
            (replica, with_purpose(opening, seed=9)),
            (replica, with_purpose(opening, ticket=ticket[:-1] + bytes([ticket[-1] ^ 1]))),
            (replica, with_purpose(opening, ticket=None)),
        ]
        for server, wrong in refused:
            said = answer(server.url, other, wrong)
            assert isinstance(said, m.Error)
            assert (said.code, said.retryable) == (m.ErrorCode.TICKET, False)
        for _ in range(2, STEPS):
            trainer.run_step()
        assert bits(trainer) == undisturbed


# -- tokens ----------------------------------------------------------------------------------------------


def revoke(tokens: BearerTokenStore) -> str:
    tokens.revoke("phone")
    return m.ErrorCode.TOKEN_REVOKED


def expire(tokens: BearerTokenStore) -> str:
    with closing(sqlite3.connect(tokens.path)) as database, database:
        database.execute("UPDATE tokens SET expires = 1.0 WHERE device = 'phone'")
    return m.ErrorCode.TOKEN_EXPIRED


def delete(tokens: BearerTokenStore) -> str:
    """As ``prune`` does of one that was revoked, which a look may come between."""
    with closing(sqlite3.connect(tokens.path)) as database, database:
        database.execute("DELETE FROM tokens WHERE device = 'phone'")
    return m.ErrorCode.TOKEN_WRONG


@pytest.mark.usefixtures("checks_often")
@pytest.mark.parametrize("end", [revoke, expire, delete])
def test_a_token_that_ends_takes_its_live_session_along(
    model: Tiny, tokens: BearerTokenStore, end: Callable[[BearerTokenStore], str]
) -> None:
    """In the middle of a step too, and nobody else's."""
    phone, other = tokens.create("phone", None), tokens.create("other", None)
    with (
        serving(model.base, access=Access(tokens, required=True)) as server,
        device(model, server.url, other) as honest,
        device(model, server.url, phone) as stolen,
    ):
        honest.run_step()
        stolen.run_step()
        code = end(tokens)
        eventually(lambda: len(server.server.service.sessions) == 1)
        with pytest.raises(RefusedError) as refused:
            stolen.run_step()
        assert refused.value.code == code
        honest.run_step()


def test_a_revoked_token_neither_resumes_nor_stays_parked(
    model: Tiny, tokens: BearerTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = tokens.create("phone", None)
    monkeypatch.setattr(cloud_server, "RECHECK_EVERY_S", 1.0)
    with (
        serving(model.base, access=Access(tokens, required=True)) as server,
        device(model, server.url, phone, Retry(max_s=20.0, first_s=0.01)) as stolen,
    ):
        sessions = server.server.service.sessions
        stolen.run_step()
        stolen.side.crossed._disconnect()
        eventually(lambda: sessions.parked == 1)
        tokens.revoke("phone")
        with pytest.raises(RefusedError) as refused:
            stolen.run_step()
        assert refused.value.code == m.ErrorCode.TOKEN_REVOKED
        eventually(lambda: len(sessions) == 0)


@pytest.mark.usefixtures("checks_often")
def test_a_connection_from_before_the_revocation_gets_no_lasting_session(model: Tiny, tokens: BearerTokenStore) -> None:
    """Let in, and silent until the token was revoked."""
    phone = tokens.create("phone", None)
    with serving(model.base, access=Access(tokens, required=True)) as server, greeted_device(server.url, phone) as it:
        tokens.revoke("phone")
        it.say(conversations.open_session(base_fingerprint=model.base.fingerprint, groups=model.base.groups(
            ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
        )))  # fmt: skip
        assert isinstance(it.hear(), m.SessionOpened)
        said = it.hear()
        assert isinstance(said, m.Error)
        assert said.code == m.ErrorCode.TOKEN_REVOKED


@pytest.mark.usefixtures("checks_often")
def test_tokens_that_cannot_be_read_for_a_while_keep_no_session_for_ever(
    model: Tiny, tokens: BearerTokenStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong with one look at them, there is a next one."""
    phone = tokens.create("phone", None)
    with (
        serving(model.base, access=Access(tokens, required=True)) as server,
        device(model, server.url, phone) as stolen,
    ):
        with closing(sqlite3.connect(tokens.path)) as database, database:
            database.execute("UPDATE tokens SET expires = x'00'")  # no number, as what another program may write
        eventually(lambda: "internal error between sessions" in caplog.messages)
        with closing(sqlite3.connect(tokens.path)) as database, database:
            database.execute("UPDATE tokens SET expires = NULL, revoked = 1.0")
        eventually(lambda: len(server.server.service.sessions) == 0)
        with pytest.raises(RefusedError):
            stolen.run_step()


# -- clocks ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("checks_often")
def test_a_wall_clock_that_is_set_drops_no_session(
    model: Tiny, tokens: BearerTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = tokens.create("phone", None)
    access = Access(tokens, required=True)
    with serving(model.base, access=access) as server, device(model, server.url, phone) as trainer:
        for _ in range(STEPS):
            trainer.run_step()
        undisturbed = bits(trainer)
    now = time.time
    with serving(model.base, access=access) as server, device(model, server.url, phone) as trainer:
        for step in range(STEPS):
            monkeypatch.setattr(time, "time", lambda step=step: now() + (-1) ** step * YEAR_S)
            trainer.run_step()
        assert bits(trainer) == undisturbed


@pytest.mark.parametrize("jump_s", [YEAR_S, -YEAR_S])
def test_a_wall_clock_that_is_set_frees_nothing(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """Neither a quota nor an address that failed too often; nor does it lock out anybody."""
    now = time.time
    quotas, access = Quotas(QuotaLimits(tokens_per_minute=100)), Access(None, required=True)
    session = quotas.open_session("phone")
    session.charge(100, 0).end(0.0)
    for _ in range(FAILURES_PER_WINDOW + 1):
        assert _denied(access) in (401, 429)
    monkeypatch.setattr(time, "time", lambda: now() + jump_s)
    with pytest.raises(RefusedError) as refused:
        session.charge(100, 0)
    assert refused.value.code == m.ErrorCode.QUOTA_TOKENS
    assert 0 < (refused.value.retry_after_s or 0) < 62
    assert _denied(access) == 429


def _denied(access: Access) -> int:
    with pytest.raises(AccessDeniedError) as denied:
        access.admit(None, Origin("192.0.2.1"))
    assert 0 <= (denied.value.retry_after_s or 0) <= 60
    return denied.value.status


@pytest.mark.parametrize("package", MAY_READ_IT)
def test_the_wall_clock_is_read_for_tokens_and_for_dates_only(package: str) -> None:
    """Deadlines, quotas, pauses and durations have clocks that nobody can set."""
    root = Path(__file__).parents[2] / package
    reads = {str(path.relative_to(root)) for path in root.rglob("*.py") if WALL_CLOCK.search(path.read_text())}
    assert reads == MAY_READ_IT[package]


def test_a_wall_clock_that_is_set_back_revives_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server runs. Set ahead, it refuses what has expired by it, and takes it again once it is right."""
    now = time.time
    tokens = BearerTokenStore(tmp_path / "tokens.sqlite")
    short, long = tokens.create("phone", 0.05), tokens.create("tablet", 3600.0)
    eventually(lambda: _state(tokens, short) == m.ErrorCode.TOKEN_EXPIRED)
    monkeypatch.setattr(time, "time", lambda: now() - YEAR_S)
    assert _state(tokens, short) == m.ErrorCode.TOKEN_EXPIRED
    assert _state(tokens, long) == "valid"
    monkeypatch.setattr(time, "time", lambda: now() + YEAR_S)
    assert _state(tokens, long) == m.ErrorCode.TOKEN_EXPIRED
    monkeypatch.setattr(time, "time", now)
    assert _state(tokens, long) == "valid"


def _state(tokens: BearerTokenStore, token: str) -> str:
    try:
        tokens.verify(token)
    except RefusedError as error:
        return error.code
    return "valid"
