"""Tokens: what is stored of them, when they stop to be valid, and the commands that manage them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_disk import remount_read_only, small_disk
from typer.testing import CliRunner
from waiting import StandingClock

from dlora.cloud.admission.tokens import BearerTokenStore
from dlora.cloud.commands.tokens import app, parse_lifetime
from dlora.protocol.errors import RefusedError, StorageError, UsageError
from dlora.protocol.messages import ErrorCode

DAY_S = 86_400.0


@pytest.fixture
def clock() -> StandingClock:
    return StandingClock()


@pytest.fixture
def store(tmp_path: Path, clock: StandingClock) -> BearerTokenStore:
    return BearerTokenStore(tmp_path / "state" / "tokens.sqlite", clock)


def refusal(store: BearerTokenStore, token: str) -> str:
    with pytest.raises(RefusedError) as caught:
        store.verify(token)
    assert not caught.value.retryable
    assert "\n" not in str(caught.value)
    return caught.value.code


def test_a_token_has_256_random_bits_and_names_its_device(store: BearerTokenStore) -> None:
    first, second = store.create("phone", DAY_S), store.create("phone", None)
    assert re.fullmatch(r"dlora_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", first)
    assert first.split("_", 2)[2] != second.split("_", 2)[2]
    assert store.verify(first).device == store.verify(second).device == "phone"
    assert store.verify(first).id == first.split("_")[1]


def test_the_file_has_no_secret_and_only_its_owner_can_read_it(store: BearerTokenStore) -> None:
    secret = store.create("phone", None).split("_", 2)[2]
    assert secret.encode() not in store.path.read_bytes()
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert [path.name for path in store.path.parent.iterdir()] == ["tokens.sqlite"]


def test_every_other_secret_is_wrong(store: BearerTokenStore) -> None:
    token, other = store.create("phone", None), store.create("tablet", None)
    changed = [token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :] for at in (15, 35, 56)]
    nonsense = ["", "dlora__", "\udce9" * 57]
    for wrong in (token[:15] + other[15:], token[:-1], token + "A", token.upper(), f" {token}", token + "\n"):
        assert refusal(store, wrong) == ErrorCode.TOKEN_WRONG
    for wrong in (*changed, *nonsense):
        assert refusal(store, wrong) == ErrorCode.TOKEN_WRONG


def test_unknown_id_takes_the_same_comparison(store: BearerTokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    token = store.create("phone", None)
    compared: list[tuple[int, int]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((len(ours), len(theirs)))
        return ours == theirs

    monkeypatch.setattr("dlora.cloud.admission.tokens.hmac.compare_digest", compare)
    store.verify(token)
    refusal(store, "dlora_00000000_" + token[15:])
    assert compared == [(32, 32)] * 2
    refusal(store, "nonsense")  # which form a token has is no secret: nothing is looked up
    assert compared == [(32, 32)] * 2


def test_token_expires_to_the_second(store: BearerTokenStore, clock: StandingClock) -> None:
    token, eternal = store.create("phone", 60), store.create("phone", None)
    clock.now += 59.5
    store.verify(token)
    clock.now += 0.5
    assert refusal(store, token) == ErrorCode.TOKEN_EXPIRED
    clock.now += 100 * 365 * DAY_S
    store.verify(eternal)


def test_only_the_right_secret_learns_that_a_token_is_revoked_or_expired(
    store: BearerTokenStore, clock: StandingClock
) -> None:
    token = store.create("phone", 60)
    clock.now += 61
    assert store.revoke("phone") == 1
    assert refusal(store, token) == ErrorCode.TOKEN_REVOKED
    assert refusal(store, token[:15] + "A" * 43) == ErrorCode.TOKEN_WRONG


def test_revoking_a_device_takes_all_its_tokens_and_an_id_takes_one(store: BearerTokenStore) -> None:
    tokens = [store.create("phone", None) for _ in range(3)]
    kept = store.create("tablet", None)
    assert store.revoke(tokens[0].split("_")[1]) == 1
    store.verify(tokens[1])
    assert store.revoke("phone") == 2
    assert store.revoke("phone") == 0
    assert store.revoke("phone' OR 1=1 --") == 0
    assert [refusal(store, token) for token in tokens] == [ErrorCode.TOKEN_REVOKED] * 3
    store.verify(kept)


def test_any_stays_true_when_the_last_token_is_revoked(store: BearerTokenStore) -> None:
    assert not store.any()
    store.create("phone", None)
    store.revoke("phone")
    assert store.any()
    assert [record.state(0) for record in store.all()] == ["revoked"]


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "-x", "x" * 65, "naïve", "../up"])
def test_a_device_has_a_name_that_is_fit_for_a_log(store: BearerTokenStore, name: str) -> None:
    with pytest.raises(UsageError, match="is no name"):
        store.create(name, None)
    assert not store.any()


def test_changes_of_another_process_apply_at_once(store: BearerTokenStore) -> None:
    token = store.create("phone", None)
    script = (
        "import sys; from pathlib import Path; from dlora.cloud.admission.tokens import BearerTokenStore; "
        "store = BearerTokenStore(Path(sys.argv[1])); print(store.revoke('phone')); print(store.create('tablet', None))"
    )
    done = subprocess.run([sys.executable, "-c", script, store.path], capture_output=True, text=True, check=True)
    revoked, created = done.stdout.split()
    assert revoked == "1"
    assert refusal(store, token) == ErrorCode.TOKEN_REVOKED
    assert BearerTokenStore(store.path).verify(created).device == "tablet"


def test_threads_may_create_and_verify_at_the_same_time(store: BearerTokenStore) -> None:
    def work(number: int) -> None:
        for _ in range(5):
            assert store.verify(store.create(f"device-{number}", None)).device == f"device-{number}"

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    assert len(store.all()) == 30


def test_pruning_the_last_record_still_requires_tokens(store: BearerTokenStore, clock: StandingClock) -> None:
    assert store.prune() == 0
    assert not store.any()  # there never was one
    revoked, expired, valid = store.create("a", None), store.create("b", DAY_S), store.create("c", None)
    store.revoke("a")
    assert store.prune() == 1
    clock.now += DAY_S
    assert store.prune() == 1
    assert refusal(store, revoked) == refusal(store, expired) == ErrorCode.TOKEN_WRONG
    assert store.verify(valid).device == "c"
    store.revoke("c")
    assert (store.prune(), store.all()) == (1, [])
    assert store.any()
    assert BearerTokenStore(store.path).any()  # as a server that starts later
    assert refusal(store, valid) == ErrorCode.TOKEN_WRONG


def assert_one_line(caught: pytest.ExceptionInfo[StorageError], path: Path) -> None:
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text


@pytest.mark.parametrize("damage", ["garbage", "torn", "no table"])
def test_damaged_token_file_is_one_line_and_refuses_all(store: BearerTokenStore, damage: str) -> None:
    token = store.create("phone", None)
    if damage == "garbage":
        store.path.write_bytes(os.urandom(8192))
    elif damage == "torn":
        os.truncate(store.path, 5000)
    else:
        with sqlite3.connect(store.path) as database:
            database.execute("DROP TABLE tokens")
    for attempt in (lambda: store.verify(token), store.any, store.all, lambda: store.create("tablet", None)):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert_one_line(caught, store.path)


def test_missing_token_file_refuses_all_and_is_not_made_again(store: BearerTokenStore) -> None:
    token = store.create("phone", None)
    store.path.unlink()
    with pytest.raises(StorageError) as caught:
        store.verify(token)
    assert_one_line(caught, store.path)
    assert not store.path.exists()


def test_locked_token_file_is_an_error_after_a_short_wait(
    store: BearerTokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlora.cloud.admission.tokens.LOCK_TIMEOUT_S", 0.01)
    token = store.create("phone", None)
    holder = sqlite3.connect(store.path)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match="locked"):
        store.verify(token)
    holder.rollback()
    holder.close()
    store.verify(token)


def test_unwritable_directory_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose --state-dir") as caught:
        BearerTokenStore(tmp_path / "file" / "tokens.sqlite")
    assert_one_line(caught, tmp_path / "file")


def test_a_read_only_disk_still_verifies_and_refuses_to_revoke(tmp_path: Path) -> None:
    with small_disk(tmp_path) as disk:
        store = BearerTokenStore(disk / "tokens.sqlite")
        token = store.create("phone", None)
        remount_read_only(disk)
        assert store.verify(token).device == "phone"
        with pytest.raises(StorageError, match="check disk and permissions"):
            store.revoke("phone")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90d", 90 * DAY_S), ("12h", 43_200.0), ("30m", 1800.0), ("never", None)]
)
def test_lifetimes_are_parsed(text: str, seconds: float | None) -> None:
    assert parse_lifetime(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "d", "0d", "-1d", "1.5h", "90 d", "1w", "999999d", "٣d", "90d\n"])
def test_invalid_lifetime_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--expires"):
        parse_lifetime(text)


class TestCommands:
    @pytest.fixture
    def state(self, tmp_path: Path) -> Path:
        return tmp_path / "state"

    def run(self, state: Path, *words: str) -> tuple[str, str]:
        done = CliRunner().invoke(app, [*words, "--state-dir", str(state)])
        if done.exception is not None:
            raise done.exception
        return done.stdout, done.stderr

    def test_create_prints_the_token_alone_and_the_advice_beside(self, state: Path) -> None:
        out, advice = self.run(state, "create", "--device", "phone")
        token = out.removesuffix("\n")
        record = BearerTokenStore(state / "tokens.sqlite").verify(token)
        assert record.device == "phone"
        assert record.expires is not None
        assert record.expires - record.created == 90 * DAY_S
        assert "--token-file" in advice
        assert token[15:] not in advice

    def test_json_output_has_the_token_record(self, state: Path) -> None:
        made = json.loads(self.run(state, "create", "--device", "phone", "--expires", "never", "--json")[0])
        assert BearerTokenStore(state / "tokens.sqlite").verify(made["token"]).id == made["id"]
        assert made["expires"] is None
        out, _ = self.run(state, "list", "--json")
        assert json.loads(out) == [{name: made[name] for name in made if name != "token"}]
        assert set(json.loads(out)[0]) == {"id", "device", "state", "created", "expires", "revoked"}
        assert made["token"][15:] not in out

    def test_list_and_revoke_print_the_tokens(self, state: Path) -> None:
        token = self.run(state, "create", "--device", "phone")[0].strip()
        out, _ = self.run(state, "list")
        assert "phone" in out
        assert "valid" in out
        assert token[15:] not in out
        assert "revoked 1 token of phone" in self.run(state, "revoke", "phone")[1]
        assert "revoked" in self.run(state, "list")[0]
        with pytest.raises(UsageError, match="no token to revoke"):
            self.run(state, "revoke", "phone")

    def test_create_writes_the_token_to_a_new_file(self, state: Path, tmp_path: Path) -> None:
        path = tmp_path / "phone.token"
        out, advice = self.run(state, "create", "--device", "phone", "--out", str(path))
        token = path.read_text().removesuffix("\n")
        assert (out, stat.S_IMODE(path.stat().st_mode)) == ("", 0o600)
        assert str(path) in advice
        assert token[15:] not in advice
        assert BearerTokenStore(state / "tokens.sqlite").verify(token).device == "phone"
        other = tmp_path / "other.token"
        made = json.loads(self.run(state, "create", "--device", "tablet", "--out", str(other), "--json")[0])
        assert made["file"] == str(other)
        assert other.read_text().strip()[15:] not in json.dumps(made)

    def test_existing_file_is_kept_and_no_token_is_created(self, state: Path, tmp_path: Path) -> None:
        path = tmp_path / "phone.token"
        path.write_text("somebody's\n")
        for place, error in ((path, UsageError), (tmp_path / "nowhere" / "x", StorageError)):
            with pytest.raises(error, match="--out"):
                self.run(state, "create", "--device", "phone", "--out", str(place))
        assert path.read_text() == "somebody's\n"
        with pytest.raises(UsageError, match="is no name"):
            self.run(state, "create", "--device", "no name", "--out", str(tmp_path / "new"))
        assert not (tmp_path / "new").exists()
        assert not BearerTokenStore(state / "tokens.sqlite").any()

    def test_a_full_disk_leaves_neither_file_nor_valid_token(self, state: Path, tmp_path: Path) -> None:
        with small_disk(tmp_path) as disk:
            with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(1024))
            with pytest.raises(StorageError, match="choose another --out"):
                self.run(state, "create", "--device", "phone", "--out", str(disk / "phone.token"))
            assert not (disk / "phone.token").exists()
        assert json.loads(self.run(state, "list", "--json")[0])[0]["state"] == "revoked"

    def test_prune_deletes_revoked_records(self, state: Path) -> None:
        for device in ("phone", "tablet"):
            self.run(state, "create", "--device", device)
        self.run(state, "revoke", "phone")
        assert "deleted the records of 1 token\n" in self.run(state, "prune")[1]
        assert [row["device"] for row in json.loads(self.run(state, "list", "--json")[0])] == ["tablet"]
        assert json.loads(self.run(state, "prune", "--json")[0]) == {"pruned": 0}

    def test_environment_variable_sets_the_state_directory(self, state: Path) -> None:
        done = CliRunner().invoke(app, ["create", "--device", "x"], env={"DLORA_CLOUD_STATE": str(state)})
        assert done.exit_code == 0
        assert (state / "tokens.sqlite").exists()
