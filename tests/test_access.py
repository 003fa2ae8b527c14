"""Who may come in, what strangers are told, and what the device makes of it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from waiting import StandingClock

from dlora.cloud.admission.access import FAILURES_PER_WINDOW, Access, AccessDeniedError, Caller
from dlora.cloud.admission.ledger import MAX_ADDRESSES, WINDOW_S, MemoryLedger
from dlora.cloud.admission.tokens import BearerTokenStore
from dlora.cloud.admission.trusted_proxies import Origin
from dlora.edge.wire.credentials import Credentials, refusal_in, split_url
from dlora.protocol.errors import UsageError
from dlora.protocol.messages import Error, ErrorCode

ADDRESS = "192.0.2.7"
CERTIFIED = Origin(ADDRESS, "phone-7")


@pytest.fixture
def clock() -> StandingClock:
    return StandingClock()


@pytest.fixture
def tokens(tmp_path: Path, clock: StandingClock) -> BearerTokenStore:
    return BearerTokenStore(tmp_path / "tokens.sqlite", clock)


@pytest.fixture
def access(tokens: BearerTokenStore, clock: StandingClock) -> Access:
    return Access(tokens, required=True, ledger=MemoryLedger(clock))


def denied(access: Access, authorization: str | None = None, address: str = ADDRESS) -> AccessDeniedError:
    with pytest.raises(AccessDeniedError) as caught:
        access.admit(authorization, Origin(address))
    return caught.value


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows each time the tokens are opened."""
    opened: list[object] = []
    connect = sqlite3.connect

    def counted(*given: Any, **more: Any) -> sqlite3.Connection:
        opened.append(given)
        return connect(*given, **more)

    monkeypatch.setattr(sqlite3, "connect", counted)
    return opened


def test_malformed_token_is_not_looked_up(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = count_opened(monkeypatch)
    for header in ("Bearer ", "Bearer dlora_0123_x", "Basic dlora_01234567_" + "x" * 43):
        assert denied(access, header).code == ErrorCode.TOKEN_WRONG
    assert not opened


class TestAdmission:
    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
    def test_a_token_names_its_device(self, access: Access, tokens: BearerTokenStore, scheme: str) -> None:
        token = tokens.create("phone", None)
        caller = access.admit(f"{scheme} {token}", Origin(ADDRESS))
        assert caller == Caller("phone", "token", token.split("_")[1])

    def test_each_reason_has_its_code(self, access: Access, tokens: BearerTokenStore, clock: StandingClock) -> None:
        expired, revoked = tokens.create("phone", 10), tokens.create("tablet", None)
        tokens.revoke("tablet")
        clock.now += 10
        cases = [
            (None, ErrorCode.TOKEN_MISSING),
            (f"Bearer {expired[:-1]}", ErrorCode.TOKEN_WRONG),
            (f"Basic {revoked}", ErrorCode.TOKEN_WRONG),
            (f"Bearer {revoked}, Bearer {revoked}", ErrorCode.TOKEN_WRONG),
            ("", ErrorCode.TOKEN_WRONG),
            (f"Bearer {expired}", ErrorCode.TOKEN_EXPIRED),
            (f"Bearer {revoked}", ErrorCode.TOKEN_REVOKED),
        ]
        for authorization, code in cases:
            error = denied(access, authorization)
            assert (error.status, error.code, error.retryable) == (401, code, False)
            assert error.should_log

    def test_the_log_line_names_the_device_and_never_the_secret(self, access: Access, tokens: BearerTokenStore) -> None:
        token = tokens.create("phone", None)
        tokens.revoke("phone")
        error = denied(access, f"Bearer {token}")
        assert "phone" in str(error)
        assert "revoked" in str(error)
        for text in (str(error), repr(error), str(error.headers()), error.body().decode()):
            assert token[15:] not in text

    def test_client_certificate_is_accepted(self, access: Access) -> None:
        assert access.admit(None, CERTIFIED) == Caller("phone-7", "certificate")
        with pytest.raises(AccessDeniedError):
            access.admit(None, Origin(ADDRESS))

    def test_a_token_is_checked_beside_a_certificate(self, access: Access, tokens: BearerTokenStore) -> None:
        assert access.admit(f"Bearer {tokens.create('tablet', None)}", CERTIFIED).name == "tablet"
        with pytest.raises(AccessDeniedError, match="not one of"):
            access.admit("Bearer dlora_wrong", CERTIFIED)

    def test_without_required_token_the_address_is_the_name(self, tokens: BearerTokenStore) -> None:
        assert Access(None, required=False).admit(None, Origin(ADDRESS)) == Caller(ADDRESS, "address")
        assert Access(None, required=False).admit("Bearer x", Origin(ADDRESS)) == Caller(ADDRESS, "address")
        with pytest.raises(AccessDeniedError):
            Access(tokens, required=False).admit("Bearer x", Origin(ADDRESS))

    @given(st.text() | st.from_regex(r"Bearer dlora_[0-9a-f]{8}_[\w-]{43}"))
    def test_other_authorization_headers_are_refused(
        self, tmp_path_factory: pytest.TempPathFactory, header: str
    ) -> None:
        store = BearerTokenStore(tmp_path_factory.getbasetemp() / "fuzzed.sqlite")
        error = denied(Access(store, required=True), header)
        assert error.code == ErrorCode.TOKEN_WRONG

    def test_unreadable_tokens_refuse_all_and_name_no_path(self, access: Access, tokens: BearerTokenStore) -> None:
        token = tokens.create("phone", None)
        caller = access.admit(f"Bearer {token}", Origin(ADDRESS))
        tokens.path.write_bytes(b"garbage" * 100)
        error = denied(access, f"Bearer {token}")
        assert (error.status, error.code, error.retryable) == (503, ErrorCode.INTERNAL, True)
        assert str(tokens.path) not in str(error)
        with pytest.raises(AccessDeniedError):
            access.recheck([caller])


class TestRecheck:
    def test_recheck_opens_the_token_file_once(
        self, access: Access, tokens: BearerTokenStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        callers = [access.admit(f"Bearer {tokens.create('phone', None)}", Origin(ADDRESS)) for _ in range(5)]
        opened = count_opened(monkeypatch)
        assert access.recheck(callers) == {}
        assert len(opened) == 1

    def test_caller_without_token_stays_at_recheck(self, access: Access, tokens: BearerTokenStore) -> None:
        caller = access.admit(None, CERTIFIED)
        tokens.path.unlink()
        assert access.recheck([caller]) == {}


class TestFailures:
    def test_eleventh_failure_in_a_minute_is_answered_429(self, access: Access, clock: StandingClock) -> None:
        for _ in range(FAILURES_PER_WINDOW):
            assert denied(access).status == 401
            clock.now += 1
        error = denied(access)
        assert (error.status, error.code, error.retryable) == (429, ErrorCode.TOO_MANY_FAILURES, True)
        assert error.retry_after_s == WINDOW_S - FAILURES_PER_WINDOW
        assert error.headers()["Retry-After"] == "50"
        clock.now += error.retry_after_s
        assert denied(access).status == 401

    def test_failures_of_one_address_are_logged_eleven_times_a_minute(self, access: Access) -> None:
        assert sum(denied(access).should_log for _ in range(1000)) == FAILURES_PER_WINDOW + 1

    def test_valid_token_passes_and_does_not_reset_failures(self, access: Access, tokens: BearerTokenStore) -> None:
        token = tokens.create("phone", None)
        for _ in range(FAILURES_PER_WINDOW + 5):
            denied(access, "Bearer wrong")
        assert access.admit(f"Bearer {token}", Origin(ADDRESS)).name == "phone"
        assert denied(access, "Bearer wrong").status == 429

    def test_failures_count_per_address_or_ipv6_64(self, access: Access) -> None:
        for number in range(FAILURES_PER_WINDOW):
            denied(access, address=f"2001:db8::{number:x}")
        assert denied(access, address="2001:db8::ffff").status == 429
        assert denied(access, address="2001:db8:0:1::1").status == 401
        for _ in range(FAILURES_PER_WINDOW + 1):
            mapped = denied(access, address="::ffff:192.0.2.1")
        assert mapped.status == 429
        assert denied(access, address="192.0.2.1").status == 429
        assert denied(access, address="::ffff:192.0.2.2").status == 401
        assert denied(access, address="?").status == 401

    def test_many_addresses_take_bounded_memory(self, access: Access) -> None:
        for number in range(MAX_ADDRESSES + 500):
            denied(access, address=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
        assert len(access._ledger._failures) == MAX_ADDRESSES  # type: ignore[attr-defined]


class TestAnswer:
    def test_refusal_has_http_headers_and_body(self, access: Access) -> None:
        missing, wrong = denied(access), denied(access, "Bearer x")
        assert missing.headers()["WWW-Authenticate"] == 'Bearer realm="dlora"'
        assert wrong.headers()["WWW-Authenticate"] == 'Bearer realm="dlora", error="invalid_token"'
        assert "Retry-After" not in wrong.headers()
        assert msgspec.json.decode(wrong.body()) == {
            "type": "error",
            "code": "token_wrong",
            "message": str(wrong),
            "retryable": False,
            "retry_after_s": None,
        }
        assert wrong.body().count(b"\n") == 1

    def test_device_reads_the_refusal_from_the_body(self, access: Access) -> None:
        for _ in range(FAILURES_PER_WINDOW + 1):
            error = denied(access)
        assert refusal_in(error.body()) == Error(
            code=ErrorCode.TOO_MANY_FAILURES, message=str(error), retryable=True, retry_after_s=WINDOW_S
        )

    @given(
        st.none() | st.binary() | st.sampled_from([b"<html>401</html>", b"{}", b'{"type":"hello"}', b"\xff", b"[1]"])
    )
    def test_answer_of_another_server_is_not_a_refusal(self, body: bytes | None) -> None:
        assert refusal_in(body) is None


class TestCredentials:
    TOKEN = "dlora_0123abcd_" + "s" * 43

    def file(self, tmp_path: Path, text: str, mode: int = 0o600) -> Path:
        path = tmp_path / "token"
        path.write_text(text)
        path.chmod(mode)
        return path

    def test_token_file_takes_precedence_over_the_variable(self, tmp_path: Path) -> None:
        file = self.file(tmp_path, f"\n{self.TOKEN}\r\n")
        environment = {"DLORA_TOKEN": "other"}
        found = Credentials.load(file, environment=environment)
        assert found.headers("wss://h:1") == {"Authorization": f"Bearer {self.TOKEN}"}
        assert Credentials.load(environment=environment).token == "other"
        assert Credentials.load(environment={"DLORA_TOKEN": " "}).headers("ws://h:1") == {}

    def test_token_is_not_in_repr_or_errors(self, tmp_path: Path) -> None:
        assert self.TOKEN not in repr(Credentials(self.TOKEN))
        for text in ("", f"{self.TOKEN}\n{self.TOKEN}", f"{self.TOKEN}\u00e9", f"x: {self.TOKEN}"):
            with pytest.raises(UsageError, match="holds no token") as caught:
                Credentials.load(self.file(tmp_path, text))
            assert "sss" not in str(caught.value)
        with pytest.raises(UsageError, match="has more than 4096 bytes"):
            Credentials.load(self.file(tmp_path, "A" * 5000))
        with pytest.raises(UsageError, match="DLORA_TOKEN holds no token"):
            Credentials.load(environment={"DLORA_TOKEN": "a\r\nX-Evil: 1"})

    def test_token_file_readable_by_others_gives_a_warning(self, tmp_path: Path) -> None:
        warnings: list[str] = []
        Credentials.load(self.file(tmp_path, self.TOKEN), warn=warnings.append)
        assert not warnings
        Credentials.load(self.file(tmp_path, self.TOKEN, 0o640), warn=warnings.append)
        assert len(warnings) == 1
        assert "chmod 600" in warnings[0]

    def test_missing_token_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot be read: No such file"):
            Credentials.load(tmp_path / "none")

    @pytest.mark.parametrize("url", ["ws://127.0.0.1:1", "ws://[::1]:1", "ws://localhost:1", "wss://example.org"])
    def test_token_is_sent_over_tls_and_loopback(self, url: str) -> None:
        assert Credentials(self.TOKEN).headers(url) == {"Authorization": f"Bearer {self.TOKEN}"}

    @pytest.mark.parametrize(
        "url", ["ws://example.org", "ws://10.0.0.1:1", "ws://127.0.0.1.example.org", "ws://[::]:1"]
    )
    def test_token_is_not_sent_unencrypted(self, url: str) -> None:
        with pytest.raises(UsageError, match="could be read on the way") as caught:
            Credentials(self.TOKEN).headers(url)
        assert self.TOKEN not in str(caught.value)
        assert Credentials(self.TOKEN, insecure=True).headers(url)
        assert Credentials().headers(url) == {}

    @pytest.mark.parametrize(
        "url",
        [
            "wss://me:hunter2@h:1",
            "wss://hunter2@h",
            "wss://h/?t=dlora_0123abcd_hunter2",
            "wss://me:hunter2@[h:1",
            "wss://h/?token=hunter2",
            "ws://localhost:1?hunter2",
            "wss://h/#hunter2",
        ],
    )
    def test_a_secret_on_the_url_is_refused_and_not_repeated(self, url: str) -> None:
        for use in (Credentials().headers, Credentials().ssl_context, split_url):
            with pytest.raises(UsageError) as caught:
                use(url)
            assert "hunter2" not in str(caught.value)
