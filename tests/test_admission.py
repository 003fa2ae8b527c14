"""Who may come in and how much they may use, with the real commands and the real server: each refusal has its code."""

from __future__ import annotations

import json
import logging
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import trustme
from families import VOCABULARY
from processes import CloudProcess, Finished, cloud_process, run_cloud, run_edge
from serving import config, final_weights, random_dataset, served_training, serving, training
from tiny import TinyFactory
from waiting import PassingClock

from dlora.cloud.admission.ledger import QuotaLimits
from dlora.cloud.model.base_model import BaseModel
from dlora.cloud.serving.timeouts import MAX_WAIT_S, SessionTimeouts
from dlora.edge.training.trainer import Trainer
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.protocol.errors import RefusedError

SECRET_TEXT = "w11 w12 w13 w14"


@dataclass(frozen=True)
class Place:
    """A bundle, data, and a server that speaks TLS and asks for tokens."""

    directory: Path
    model: Path
    bundle: Path
    cloud: CloudProcess
    ca: Path

    def cloud_command(self, *arguments: str, code: int = 0) -> str:
        done = run_cloud(*arguments, DLORA_CLOUD_STATE=str(self.directory / "state"))
        assert done.code == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def token(self, device: str, *options: str) -> Path:
        path = self.directory / f"{device}.token"
        path.write_text(self.cloud_command("token", "create", "--device", device, *options))
        path.chmod(0o600)
        return path

    def train(self, out: Path, *options: object, **environment: str) -> Finished:
        return run_edge(
            "train", "--kind", "lora", "--bundle", self.bundle,
            "--server", self.cloud.url, "--data", self.directory / "data.jsonl",
            "--out", out, "--steps", 2, "--threads", 1, "--ca", self.ca, *options, **environment,
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("strangers")
    model = tiny()
    (directory / "data.jsonl").write_text((json.dumps({"text": SECRET_TEXT}) + "\n") * 4)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    served = authority.issue_cert("localhost", "127.0.0.1")
    served.private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))
    first = run_cloud("token", "create", "--device", "first", "--state-dir", directory / "state")
    assert first.stdout.startswith("dlora_")
    with cloud_process(model.model, directory, "--tls-cert", directory / "server.pem") as cloud:
        assert cloud.url.startswith("wss://")
        yield Place(directory, model.model, model.bundle, cloud, directory / "ca.pem")


def refused(done: Finished, code: int, *words: str) -> None:
    assert done.code == code, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.errors) == 1, done.stderr
    for word in words:
        assert word in done.errors[0]


def test_device_with_a_token_trains_until_it_is_revoked(place: Place, tmp_path: Path) -> None:
    """While the server runs."""
    token = place.token("phone")
    done = place.train(tmp_path / "out", "--token-file", token)
    assert done.code == 0, done.stderr
    place.cloud_command("token", "revoke", "phone")
    refused(place.train(tmp_path / "other", "--token-file", token), 8, "revoked", "phone")
    log, listed = place.cloud.log.read_text(), place.cloud_command("token", "list", "--json")
    assert "opened at step 0 by phone" in log
    assert "refused: token_revoked" in log
    for secret in (token.read_text().strip(), SECRET_TEXT, "w11"):
        assert secret not in log + listed


def test_device_without_token_is_refused(place: Place, tmp_path: Path) -> None:
    refused(place.train(tmp_path / "out"), 8, "refused", "no token", "--token-file")
    assert "127.0.0.1 refused: token_missing" in place.cloud.log.read_text()


def test_token_in_the_url_is_refused(place: Place) -> None:
    """By a program of somebody's own: refused although it is valid, and nowhere repeated, for logs have it by now."""
    token = place.token("careless").read_text().strip()
    context = ssl.create_default_context(cafile=place.ca)
    for path in (f"/?token={token}", f"/healthz?{token}"):
        request = urllib.request.Request(
            place.cloud.url.replace("wss://", "https://") + path, headers={"Authorization": f"Bearer {token}"}
        )
        with pytest.raises(urllib.error.HTTPError) as answer:
            urllib.request.urlopen(request, context=context, timeout=120)
        body = answer.value.read().decode()
        assert answer.value.code == 401
        assert json.loads(body)["code"] == "token_wrong"
        assert "revoked" in body
        assert token not in body
    secret = token.split("_", 2)[2]  # which may have a "_" itself
    assert len(secret) == 43
    assert secret not in place.cloud.log.read_text()


def test_unknown_server_certificate_is_refused(place: Place, tmp_path: Path) -> None:
    other = trustme.CA()
    other.cert_pem.write_to_path(str(tmp_path / "other.pem"))
    token = place.token("careful")
    done = place.train(tmp_path / "out", "--token-file", token, "--ca", tmp_path / "other.pem")
    refused(done, 6, "certificate", "--ca")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), ("--tls-cert",)),
        (("--host", "::"), ("--tls-cert",)),
        (("--host", "0.0.0.0", "--tls-cert", "{cert}", "--state-dir", "{empty}"), ("token create",)),
    ],
    ids=["plain", "plain IPv6", "TLS, but everybody"],
)
def test_server_refuses_a_network_without_protection(
    place: Place, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    filled = [option.format(cert=place.directory / "server.pem", empty=tmp_path) for option in options]
    said = place.cloud_command("serve", str(place.model), "--port", "0", *filled, code=2)
    for word in (*words, "--insecure"):
        assert word in said


# -- quotas ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny().base


STEPS = 5
PATIENT = ConnectSettings(retry=Retry(max_s=None))


def undisturbed(place: Place, base: BaseModel) -> dict[str, np.ndarray]:
    with served_training(base, place.bundle, run(), data()) as trainer:
        return after_all_steps(trainer)


def run(**changes: object):  # type: ignore[no-untyped-def]
    return config(total_steps=STEPS, **changes)


def data():  # type: ignore[no-untyped-def]
    return random_dataset(VOCABULARY)


def after_all_steps(trainer: Trainer) -> dict[str, np.ndarray]:
    while trainer.next_step < STEPS:
        trainer.run_step()
    return final_weights(trainer)


@pytest.mark.parametrize(
    ("limits", "code"),
    [(QuotaLimits(tokens_per_minute=40), "quota_tokens"), (QuotaLimits(compute_s_per_hour=0.01), "quota_compute")],
    ids=["tokens", "compute"],
)
def test_a_device_above_its_quota_waits_and_ends_with_the_same_bits(
    place: Place, base: BaseModel, limits: QuotaLimits, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = undisturbed(place, base)
    clock = PassingClock()
    connecting = ConnectSettings(retry=Retry(max_s=None), clock=clock, sleep=clock.sleep)
    timeouts = SessionTimeouts(idle_s=MAX_WAIT_S, step_s=MAX_WAIT_S)  # an hour may pass here in no time
    caplog.set_level(logging.INFO, "dlora.cloud")
    settings = {"quotas": limits, "clock": clock, "timeouts": timeouts}
    with served_training(base, place.bundle, run(), data(), connecting, **settings) as trainer:
        found = after_all_steps(trainer)
        assert trainer.side.crossed.reconnects > 0
        assert trainer.side.crossed.resumed == trainer.side.crossed.reconnects  # no step was run again
    assert clock.slept_s > 30
    for name, value in wanted.items():
        assert (found[name] == value).all(), name
    assert code in caplog.text
    assert "127.0.0.1" in caplog.text


def test_a_device_that_only_reports_is_charged_for_it(place: Place, base: BaseModel) -> None:
    little = QuotaLimits(compute_s_per_hour=1e-9)
    with served_training(base, place.bundle, run(), data(), quotas=little) as trainer:
        scores = np.ones(len(trainer.side.crossed.session.units.states), np.float32)
        trainer.session.report(scores)
        trainer.session.wait_for_signal()
        trainer.session.report(scores)
        with pytest.raises(RefusedError) as told:
            trainer.session.wait_for_signal()
    assert (told.value.code, told.value.retryable) == ("quota_compute", True)


def test_too_many_sessions_of_a_device_are_refused(place: Place, base: BaseModel) -> None:
    with (
        serving(base, quotas=QuotaLimits(sessions=1)) as server,
        training(place.bundle, server.url, run(), data()) as first,
    ):
        first.run_step()
        with pytest.raises(RefusedError) as told, training(place.bundle, server.url, run(), data()):
            pass
        assert (told.value.code, told.value.retryable) == ("quota_sessions", True)
        first.run_step()
