"""Interchangeable servers behind HAProxy, with the configuration that is shipped: who comes, where to, and back."""

from __future__ import annotations

import dataclasses
import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import conversations
import numpy as np
import pytest
import trustme
from families import VOCABULARY
from haproxies import Haproxy, address_of, haproxy
from processes import CloudProcess, cloud_process
from serving import RunningServer, config, final_weights, greeted_device, random_dataset, serving, training
from tiny import TinyFactory
from waiting import eventually
from websockets.datastructures import Headers
from websockets.sync.client import ClientConnection, connect

from dlora.cloud.admission.tls import server_context
from dlora.cloud.admission.trusted_proxies import Origin, TrustedProxies
from dlora.cloud.model.base_model import BaseModel
from dlora.edge.wire.connecting import ConnectSettings, Retry
from dlora.edge.wire.connection import Connection
from dlora.edge.wire.cookies import MOST_BYTES, Cookies
from dlora.edge.wire.credentials import Credentials
from dlora.protocol import messages as m
from dlora.protocol.errors import ConnectionFailedError, UsageError

PATIENT = ConnectSettings(retry=Retry(max_s=100, first_s=0.01, ceiling_s=0.1))
HOST = "127.0.0.1"
QUERIES = ["model.layers.0.self_attn.q_proj"]


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny().base


@pytest.fixture(scope="module")
def bundle(tiny: TinyFactory) -> Path:
    return tiny().bundle


@contextmanager
def two_replicas(base: BaseModel, directory: Path, **settings: object) -> Iterator[tuple[Haproxy, list[RunningServer]]]:
    with ExitStack() as stack:
        trusted = {"proxies": TrustedProxies([HOST]), **settings}
        servers = [stack.enter_context(serving(base, **trusted)) for _ in range(2)]
        yield stack.enter_context(haproxy([server.url for server in servers], directory)), servers


@contextmanager
def two_processes(model: Path, directory: Path, *options: object) -> Iterator[tuple[Haproxy, Sequence[CloudProcess]]]:
    """Two real servers with one key, whose proxy takes them for healthy."""
    with ExitStack() as stack:
        state = ("--state-dir", directory / "state")
        started = [cloud_process(model, directory / name, *state, *options) for name in ("one", "two")]
        processes = [stack.enter_context(each) for each in started]
        proxy = stack.enter_context(haproxy([each.url for each in processes], directory))
        eventually(lambda: proxy.states() == ["UP", "UP"])
        yield proxy, processes


def callers(server: RunningServer) -> set[tuple[str, str]]:
    """Those whose connections are not forgotten yet: name, and what it was taken from."""
    return {(caller.name, caller.source) for caller in server.server._callers.values()}


# -- back to one's session -----------------------------------------------------------------------------------


def train_alone(base: BaseModel, bundle: Path, seed: int) -> dict[str, np.ndarray]:
    with (
        serving(base) as server,
        training(bundle, server.url, config(), random_dataset(VOCABULARY, seed=seed)) as alone,
    ):
        for _ in range(4):
            alone.run_step()
        return final_weights(alone)


def test_devices_whose_connections_are_cut_come_back_to_their_session(
    base: BaseModel, bundle: Path, tmp_path: Path
) -> None:
    """Two devices, one on each server: each comes back to where it was, and to the bits of a run alone."""
    with two_replicas(base, tmp_path) as (proxy, servers), ExitStack() as stack:
        devices = [
            stack.enter_context(training(bundle, proxy.url, config(), random_dataset(VOCABULARY, seed=seed), PATIENT))
            for seed in range(2)
        ]
        for device in devices:
            device.run_step()
        assert [len(server.server.service.sessions) for server in servers] == [1, 1]
        for replica in (1, 2, 1):
            proxy.cut(replica)
            for device in devices:
                device.run_step()
        crossed = [device.side.crossed for device in devices]
        assert sorted((each.resumed, each.reconnects) for each in crossed) == [(1, 1), (2, 2)]
        found = [final_weights(device) for device in devices]
    for seed, weights in enumerate(found):
        alone = train_alone(base, bundle, seed)
        assert all(np.array_equal(weights[name], value) for name, value in alone.items())


def test_a_killed_server_costs_a_step_and_no_bit(
    base: BaseModel, bundle: Path, tiny: TinyFactory, tmp_path: Path
) -> None:
    """A real process, killed with -9 in the middle of a run: its device goes on at the other one."""
    with (
        two_processes(tiny().model, tmp_path) as (proxy, processes),
        training(bundle, proxy.url, config(), random_dataset(VOCABULARY, seed=0), PATIENT) as trainer,
    ):
        trainer.run_step()
        processes[proxy.connections().index(1)].end(signal.SIGKILL)
        for _ in range(3):
            trainer.run_step()
        assert trainer.side.crossed.resumed == 0
        assert trainer.steps_rerun <= 1
        found = final_weights(trainer)
    alone = train_alone(base, bundle, 0)
    assert all(np.array_equal(found[name], value) for name, value in alone.items())


# -- a server that stops -------------------------------------------------------------------------------------


def test_no_newcomer_meets_a_server_that_stops(base: BaseModel, tiny: TinyFactory, tmp_path: Path) -> None:
    """From the first moment on, while the proxy still takes it for healthy, and when it no longer does."""
    with two_processes(tiny().model, tmp_path, "--drain-s", 100) as (proxy, processes), ExitStack() as stack:
        device = stack.enter_context(greeted_device(processes[0].url))
        device.say(conversations.open_session(base_fingerprint=base.fingerprint, groups=base.groups(QUERIES)))
        assert isinstance(device.hear(), m.SessionOpened)
        device.say(conversations.embeddings_of([3], 16))  # in the midst of a step, which the server waits for
        assert isinstance(device.hear(), m.GroupInput)
        processes[0].process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in processes[0].log.read_text())
        for states in (None, ["DOWN", "UP"]):  # at once, while the proxy takes it for healthy; and later
            eventually(lambda: states is None or proxy.states() == states)  # noqa: B023
            newcomers = [stack.enter_context(Connection(proxy.url, PATIENT)) for _ in range(4)]
            assert [newcomer.reconnects for newcomer in newcomers] == [0] * 4
        with pytest.raises(urllib.error.HTTPError) as health:
            urllib.request.urlopen(f"http://{address_of(processes[0].url)}/healthz", timeout=120)
        assert (health.value.code, health.value.headers["Retry-After"]) == (503, "1")
        assert json.load(health.value)["status"] == "draining"


def test_a_device_waits_for_a_proxy_that_has_no_server_yet(base: BaseModel, tmp_path: Path) -> None:
    """Also its first connection, which fails at once where nobody answers."""
    nobody = f"ws://{HOST}:1"
    with serving(base) as server, haproxy([nobody, nobody], tmp_path) as proxy:
        said: list[str] = []

        def start_server(line: str) -> None:
            said.append(line)
            proxy.command(f"set server replicas/replica-1 addr {HOST} port {server.server.port}")

        with Connection(proxy.url, dataclasses.replace(PATIENT, say=start_server)) as connection:
            assert connection.welcome.base_fingerprint == base.fingerprint
    assert f"{proxy.url} has no server to hand us on to just now (HTTP 503)" in said[0]
    with (
        haproxy([nobody, nobody], tmp_path) as proxy,
        pytest.raises(ConnectionFailedError, match="no server to hand us on to"),
    ):
        Connection(proxy.url)  # that is not to try again


# -- who it is -----------------------------------------------------------------------------------------------


FORGED = {"X-Forwarded-For": "192.0.2.9", "X-SSL-Client-CN": "admin"}


def call(url: str, source: str, headers: Mapping[str, str]) -> ClientConnection:
    """Be let in, from an address of this machine's, with these headers."""
    return connect(url, compression=None, proxy=None, source_address=(source, 0), additional_headers=headers)


def test_two_addresses_behind_the_proxy_are_two_callers(base: BaseModel, tmp_path: Path) -> None:
    with two_replicas(base, tmp_path) as (proxy, servers), ExitStack() as stack:
        for source in ("127.0.0.2", "127.0.0.3"):
            for headers in ({}, FORGED):
                stack.enter_context(call(proxy.url, source, headers))
        assert callers(servers[0]) | callers(servers[1]) == {("127.0.0.2", "address"), ("127.0.0.3", "address")}


def test_what_a_stranger_says_of_itself_is_not_believed(base: BaseModel) -> None:
    with serving(base, proxies=TrustedProxies([HOST])) as server, call(server.url, "127.0.0.9", FORGED):
        assert callers(server) == {("127.0.0.9", "address")}


def test_certificates_and_tls_on_both_sides_of_the_proxy(base: BaseModel, tmp_path: Path) -> None:
    """The name in a device's certificate reaches the server; of the proxy's own connection it takes none."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name in (HOST, "phone"):
        issued = authority.issue_cert(HOST, common_name=name)
        issued.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
    ca = str(tmp_path / "ca.pem")
    settings = {"DLORA_TLS_CERT": str(tmp_path / f"{HOST}.pem"), "DLORA_CLIENT_CA": ca}
    settings |= {"DLORA_REPLICAS_CA": ca, "DLORA_REPLICAS_NAME": HOST}
    tls = server_context(tmp_path / f"{HOST}.pem", None, tmp_path / "ca.pem")
    with (
        serving(base, proxies=TrustedProxies([HOST]), tls=tls) as server,
        haproxy([server.url, server.url], tmp_path, **settings) as proxy,
    ):
        for certificate, name in ((tmp_path / "phone.pem", ("phone", "certificate")), (None, (HOST, "address"))):
            credentials = Credentials(ca=tmp_path / "ca.pem", client_cert=certificate)
            with Connection(f"wss://{HOST}:{proxy.port}", ConnectSettings(credentials)):
                assert callers(server) == {name}


CERTIFICATE = {"subject": ((("commonName", "x\n12:00 session\x1b[2J" + "y" * 100),),)}


@pytest.mark.parametrize(
    ("peer", "headers", "address", "name"),
    [
        ("10.0.0.5", [("X-Forwarded-For", "192.0.2.1, 192.0.2.2")], "192.0.2.2", None),
        ("10.0.0.5", [("X-Forwarded-For", "192.0.2.1"), ("X-Forwarded-For", "192.0.2.2")], "192.0.2.2", None),
        ("::ffff:10.0.0.5", [("X-Forwarded-For", "2001:db8::1")], "2001:db8::1", None),
        ("10.0.0.5", [("X-Forwarded-For", "192.0.2.1, unknown")], "10.0.0.5", None),
        ("10.0.0.5", [("X-Forwarded-For", "")], "10.0.0.5", None),
        ("10.0.0.5", [("X-SSL-Client-CN", "ph[one")], "10.0.0.5", "ph?one"),
        ("10.0.0.5", [("X-SSL-Client-CN", "")], "10.0.0.5", None),
        ("10.0.0.9", [("X-Forwarded-For", "192.0.2.1"), ("X-SSL-Client-CN", "phone")], "10.0.0.9", ...),
        ("nonsense", [("X-Forwarded-For", "192.0.2.1")], "nonsense", ...),
    ],
)
def test_origin_is_what_a_trusted_proxy_says(
    peer: str, headers: list[tuple[str, str]], address: str, name: object
) -> None:
    """... stands for the name in the certificate of the connection itself, which is made fit for a log."""
    origin = TrustedProxies(["10.0.0.4/31", "2001:db8::/64"]).origin(peer, CERTIFICATE, Headers(headers))
    own = "x?12:00 session?[2J".replace(":", "?").replace("[", "?") + "y" * 45
    assert origin == Origin(address, own if name is ... else name)


def test_what_is_no_address_of_a_proxy_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--trusted-proxy: .*give an IP address"):
        TrustedProxies(["proxy.example.org"])


# -- cookies -------------------------------------------------------------------------------------------------


def test_a_cookie_is_shown_until_it_is_replaced_or_dropped() -> None:
    cookies = Cookies()
    assert cookies.headers() == {}
    cookies.keep(Headers([("Set-Cookie", "dlora=1; path=/; HttpOnly"), ("Set-Cookie", "b=x; Secure")]))
    assert cookies.headers() == {"Cookie": "dlora=1; b=x"}
    cookies.keep(Headers([("Set-Cookie", "dlora=2"), ("Set-Cookie", "b=; Max-Age=0")]))
    assert cookies.headers() == {"Cookie": "dlora=2"}
    cookies.keep(Headers([("Set-Cookie", "bad name=2"), ("Set-Cookie", "]=2")]))
    assert cookies.headers() == {"Cookie": "dlora=2"}
    cookies.keep(Headers([("Set-Cookie", "large=" + "x" * MOST_BYTES)]))
    assert cookies.headers() == {}
