"""Two real servers that share a ledger: how soon a token that was revoked once is refused, and what a Valkey that is
killed forgets. A part of fleet.py. The quota's property test has its 10,000 draws in tests/test_ledger.py."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Final

from bars import Entry, at_least, at_most
from children import log

_TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(_TESTS)]

import conversations  # noqa: E402
from families import save_tiny  # noqa: E402
from processes import cloud_process, run_cloud  # noqa: E402
from serving import RawDevice, greeted_device  # noqa: E402
from valkeys import valkey_server  # noqa: E402
from websockets.exceptions import InvalidStatus  # noqa: E402

from dlora.cloud.admission.ledger import QuotaLimits  # noqa: E402
from dlora.cloud.admission.tokens import FILE_NAME, BearerTokenStore  # noqa: E402
from dlora.cloud.admission.valkey_ledger import ValkeyLedger  # noqa: E402
from dlora.cloud.model.base_model import load_base_model  # noqa: E402
from dlora.protocol import messages as m  # noqa: E402

CALLERS: Final = 50
LONG_S: Final = 60.0
LIMITS: Final = QuotaLimits(tokens_per_minute=100)


def measure(directory: Path) -> dict[str, Any]:
    """Revoke tokens while Valkey lives, is killed and is back."""
    save_tiny(directory / "model")
    base = load_base_model(str(directory / "model"))
    groups = base.groups(["model.layers.0.self_attn.q_proj"])
    states = [directory / name / "state" for name in ("one", "two")]
    store = BearerTokenStore(states[0] / FILE_NAME)
    tokens = [store.create(f"device-{n}", None) for n in range(3)]
    shutil.copytree(states[0], states[1])
    (directory / "valkey").mkdir()
    with ExitStack() as stack:
        valkey = stack.enter_context(valkey_server(directory / "valkey"))
        shared = ("--ledger", valkey.url)
        started = [cloud_process(directory / "model", state.parent, *shared) for state in states]
        urls = [stack.enter_context(each).url for each in started]

        def open_everywhere(token: str) -> list[RawDevice]:
            devices = [stack.enter_context(greeted_device(url, token)) for url in urls]
            for device in devices:
                device.say(conversations.open_session(base_fingerprint=base.fingerprint, groups=groups))
                assert isinstance(device.hear(), m.SessionOpened)
            return devices

        def revoke(device: str) -> float:
            assert run_cloud("token", "revoke", device, "--state-dir", states[0], *shared).code == 0
            return time.monotonic()

        devices, began = open_everywhere(tokens[0]), revoke("device-0")
        newcomers_s = max(_seconds_until(lambda url=url: _is_refused(url, tokens[0], 401), began) for url in urls)
        for device in devices:
            device.hear_error()
        sessions_s = time.monotonic() - began
        log(f"revoked: newcomers refused after {newcomers_s:.2f} s, sessions ended after {sessions_s:.1f} s")

        ledger = stack.enter_context(closing(ValkeyLedger(valkey.url)))
        charged = [ledger.charge(f"caller-{n}", 100, LIMITS) for n in range(CALLERS)]
        revoke("device-1")
        valkey.kill()
        closed = all(_is_refused(url, tokens[2], 503) for url in urls)
        valkey.start()
        began = time.monotonic()
        back_s = max(_seconds_until(lambda url=url: not _is_refused(url, tokens[2], 503), began) for url in urls)
        counted_s = _seconds_until(lambda: ledger.charge("caller-0", 50, LIMITS) is not None, began)
        kept = sum(ledger.charge(f"caller-{n}", 50, LIMITS) is not None for n in range(CALLERS))
        still = sum(_is_refused(url, token, 401) for url in urls for token in tokens[:2])
    return {
        "newcomers_refused_after_s": newcomers_s, "sessions_ended_after_s": sessions_s,
        "charged": sum(each is None for each in charged), "callers_still_charged": kept,
        "refused_while_away": closed, "revocations_kept_of_4": still,
        "tokens_again_after_s": back_s, "quotas_again_after_s": counted_s,
    }  # fmt: skip


def bars(found: dict[str, Any], command: str) -> dict[str, Entry]:
    """The fourth of the issue's."""
    return {
        "accounts: seconds until a revoked token is refused by both servers": at_most(
            10, max(found["newcomers_refused_after_s"], found["sessions_ended_after_s"]), command
        ),
        "accounts: revoked tokens refused after Valkey was killed, of 4": at_least(
            4, found["revocations_kept_of_4"], command
        ),
        "accounts: quotas that Valkey had when it was killed, of 50": at_least(
            CALLERS, found["callers_still_charged"], command
        ),
        "accounts: seconds until quotas count again": at_most(1, found["quotas_again_after_s"], command),
    }


def _is_refused(url: str, token: str, status: int) -> bool:
    try:
        with greeted_device(url, token):
            return False
    except InvalidStatus as refusal:
        return refusal.response.status_code == status


def _seconds_until(holds: Callable[[], bool], began: float) -> float:
    while not holds():
        if time.monotonic() - began > LONG_S:
            return float("inf")
        time.sleep(0.01)
    return time.monotonic() - began
