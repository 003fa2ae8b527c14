"""TLS on a real loopback websocket, with real certificates: who is let in, who is not, and the one line for it."""

from __future__ import annotations

import datetime
import http
import socket
import ssl
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from serving import RunningServer, serving
from tiny import TinyFactory
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

from dlora.cloud.admission.access import Access
from dlora.cloud.admission.tls import check_exposure, server_context
from dlora.cloud.admission.tokens import BearerTokenStore
from dlora.cloud.model.base_model import BaseModel
from dlora.edge.wire.credentials import Credentials, refusal_in, tls_failure
from dlora.protocol.connections import is_loopback
from dlora.protocol.errors import UsageError

HOST = "127.0.0.1"
# How websockets tells of a peer that is gone before it answered; with TLS 1.3 that depends on who was faster.
FAILED = (OSError, InvalidMessage, ConnectionClosed)
LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of PEM files: two authorities, server certificates, and a device's."""
    folder = tmp_path_factory.mktemp("pki")
    ours, other = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(folder / "ca.pem")
    other.cert_pem.write_to_path(folder / "other-ca.pem")
    issued = {
        "server": ours.issue_cert(HOST),
        "expired": ours.issue_cert(HOST, not_before=LONG_AGO, not_after=LONG_AGO + datetime.timedelta(days=1)),
        "elsewhere": ours.issue_cert("example.org"),
        "device": ours.issue_cert("phone@example.org", common_name="phone"),
        "stranger": other.issue_cert("phone@example.org", common_name="phone"),
    }
    for name, certificate in issued.items():
        (folder / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        certificate.private_key_pem.write_to_path(folder / f"{name}.key")
        certificate.private_key_and_cert_chain_pem.write_to_path(folder / f"{name}-both.pem")
    key = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"hunter2"),
    )
    (folder / "encrypted.key").write_bytes(encrypted)
    (folder / "garbage.pem").write_text("-----BEGIN CERTIFICATE-----\nnonsense\n")
    return folder


@pytest.fixture(scope="module")
def base(tiny: TinyFactory) -> BaseModel:
    return tiny().base


def call(server: RunningServer, credentials: Credentials, scheme: str = "wss") -> str:
    """Connect as a device; the name under which it was let in."""
    url = f"{scheme}://{HOST}:{server.server.port}"
    with connect(
        url, ssl=credentials.ssl_context(url), additional_headers=credentials.headers(url), proxy=None, open_timeout=60
    ):
        return list(server.server._callers.values())[-1].name


def failure(server: RunningServer, credentials: Credentials) -> str:
    """The one line for a connection that fails in TLS."""
    with pytest.raises(ssl.SSLError) as caught:
        call(server, credentials)
    line = str(tls_failure(caught.value, "wss://it"))
    assert "\n" not in line
    return line


@pytest.fixture
def tokens(tmp_path: Path) -> BearerTokenStore:
    return BearerTokenStore(tmp_path / "tokens.sqlite")


class TestConnections:
    def test_trusted_server_and_valid_token_connect(self, base: BaseModel, pki: Path, tokens: BearerTokenStore) -> None:
        token = tokens.create("phone", None)
        tls = server_context(pki / "server.pem", pki / "server.key")
        with serving(base, tls=tls, access=Access(tokens, required=True)) as server:
            assert call(server, Credentials(token, ca=pki / "ca.pem")) == "phone"
            for other, code in ((None, "token_missing"), (token[:15] + "A" * 43, "token_wrong")):
                with pytest.raises(InvalidStatus) as caught:
                    call(server, Credentials(other, ca=pki / "ca.pem"))
                response = caught.value.response
                assert response.status_code == http.HTTPStatus.UNAUTHORIZED
                assert response.headers["WWW-Authenticate"].startswith("Bearer")
                refusal = refusal_in(response.body)
                assert refusal is not None
                assert refusal.code == code

    def test_server_sends_no_session_ticket(self, base: BaseModel, pki: Path) -> None:
        """While one comes, a device's two threads cannot both use its TLS connection."""
        tls = Credentials(None, ca=pki / "ca.pem").ssl_context(f"wss://{HOST}")
        context = server_context(pki / "server.pem", pki / "server.key")
        with (
            serving(base, tls=context) as server,
            connect(f"wss://{HOST}:{server.server.port}", ssl=tls, proxy=None, open_timeout=60) as connection,
        ):
            assert isinstance(connection.socket, ssl.SSLSocket)
            assert connection.socket.version() == "TLSv1.3"
            assert connection.socket.session is not None
            assert not connection.socket.session.has_ticket

    @pytest.mark.parametrize(
        ("served", "ca", "words"),
        [
            ("server", "other-ca.pem", "unable to get local issuer"),
            ("server", None, "unable to get local issuer"),
            ("expired", "ca.pem", "expired"),
            ("elsewhere", "ca.pem", "IP address mismatch"),
        ],
    )
    def test_untrusted_server_is_refused(
        self, base: BaseModel, pki: Path, served: str, ca: str | None, words: str
    ) -> None:
        context = server_context(pki / f"{served}.pem", pki / f"{served}.key")
        with serving(base, tls=context) as server:
            for insecure in (False, True):
                credentials = Credentials("never-sent", ca=ca and pki / ca, insecure=insecure)
                line = failure(server, credentials)
                assert "not to be trusted" in line
                assert words in line

    def test_client_certificates_are_checked(self, base: BaseModel, pki: Path) -> None:
        context = server_context(pki / "server.pem", pki / "server.key", pki / "ca.pem")
        with serving(base, tls=context, access=Access(None, required=True)) as server:
            ca = pki / "ca.pem"
            good = Credentials(ca=ca, client_cert=pki / "device.pem", client_key=pki / "device.key")
            assert call(server, good) == "phone"
            assert call(server, Credentials(ca=ca, client_cert=pki / "device-both.pem")) == "phone"
            with pytest.raises(InvalidStatus) as caught:
                call(server, Credentials(ca=ca))
            refusal = refusal_in(caught.value.response.body)
            assert refusal is not None
            assert refusal.code == "token_missing"
            assert "--client-cert" in refusal.message
            forged = Credentials(ca=ca, client_cert=pki / "stranger.pem", client_key=pki / "stranger.key")
            with pytest.raises(FAILED):
                call(server, forged)
            assert call(server, good) == "phone"

    def test_unknown_client_certificate_is_named_in_the_error(self, base: BaseModel, pki: Path) -> None:
        context = server_context(pki / "server.pem", pki / "server.key", pki / "ca.pem")
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with serving(base, tls=context, access=Access(None, required=True)) as server:
            forged = Credentials(ca=pki / "ca.pem", client_cert=pki / "stranger-both.pem")
            assert "does it not trust --client-cert?" in failure(server, forged)

    def test_tls_and_plain_mismatch_is_explained(self, base: BaseModel, pki: Path) -> None:
        with serving(base) as server:
            assert "is it ws://" in failure(server, Credentials(ca=pki / "ca.pem"))
        context = server_context(pki / "server.pem", pki / "server.key")
        with serving(base, tls=context) as server, pytest.raises(FAILED):
            call(server, Credentials(), scheme="ws")

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
    def test_old_tls_is_refused_by_both(self, base: BaseModel, pki: Path) -> None:
        contexts = [
            server_context(pki / "server.pem", pki / "server.key"),
            Credentials(ca=pki / "ca.pem").ssl_context("wss://h"),
        ]
        for context in contexts:
            assert context is not None
            assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        old = ssl.create_default_context(cafile=pki / "ca.pem")
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            serving(base, tls=contexts[0]) as server,
            socket.create_connection((HOST, server.server.port)) as plain,
            pytest.raises(ssl.SSLError),
        ):
            old.wrap_socket(plain, server_hostname=HOST)


class TestFiles:
    @pytest.mark.parametrize(
        ("cert", "key", "client_ca", "words"),
        [
            ("none.pem", "server.key", None, "--tls-cert .*none.pem cannot be read: No such file"),
            ("server.pem", "none.key", None, "--tls-key .*none.key cannot be read: No such file"),
            ("server.pem", ".", None, "--tls-key .* cannot be read: Is a directory"),
            ("server.pem", "device.key", None, "device.key is not the key of --tls-cert"),
            ("server.pem", "encrypted.key", None, "encrypted.key is encrypted; .*openssl pkey"),
            ("server.pem", None, None, "--tls-key is missing"),
            ("garbage.pem", "server.key", None, "no certificate or key in PEM form"),
            ("server.pem", "garbage.pem", None, "no certificate or key in PEM form"),
            ("server.pem", "server.key", "garbage.pem", "--tls-client-ca .* is no certificate"),
            ("server.pem", "server.key", "none.pem", "--tls-client-ca .* cannot be read"),
        ],
    )
    def test_invalid_server_certificate_files_are_usage_errors(
        self, pki: Path, cert: str, key: str | None, client_ca: str | None, words: str
    ) -> None:
        with pytest.raises(UsageError, match=words):
            server_context(pki / cert, key and pki / key, client_ca and pki / client_ca)

    def test_key_and_certificate_may_share_a_file(self, pki: Path) -> None:
        server_context(pki / "server-both.pem", None)

    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({"ca": "none.pem"}, "--ca .* cannot be read: No such file"),
            ({"ca": "garbage.pem"}, "--ca .* is no certificate"),
            ({"client_cert": "none.pem"}, "--client-cert .* cannot be read"),
            ({"client_cert": "device.pem", "client_key": "none.key"}, "--client-key .* cannot be read"),
            ({"client_cert": "device.pem", "client_key": "server.key"}, "server.key is not the key of --client-cert"),
            ({"client_cert": "device.pem", "client_key": "encrypted.key"}, "is encrypted"),
            ({"client_cert": "garbage.pem", "client_key": "device.key"}, "is not in PEM form"),
        ],
    )
    def test_invalid_device_certificate_files_are_usage_errors(
        self, pki: Path, files: dict[str, str], words: str
    ) -> None:
        credentials = Credentials.load(environment={}, **{name: pki / file for name, file in files.items()})
        with pytest.raises(UsageError, match=words):
            credentials.ssl_context("wss://h")

    def test_tls_options_without_tls_are_usage_errors(self, pki: Path) -> None:
        assert Credentials().ssl_context("ws://h") is None
        with pytest.raises(UsageError, match="for wss://"):
            Credentials(ca=pki / "ca.pem").ssl_context("ws://h")
        with pytest.raises(UsageError, match="--client-key needs --client-cert"):
            Credentials.load(client_key=pki / "device.key", environment={})


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.10", "::1", "[::1]", "::ffff:127.0.0.1"]
)
def test_loopback_needs_no_protection(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, tls=False, authenticated=False, insecure=False)


@pytest.mark.parametrize(
    "host",
    ["", "0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.example.org", "127.0.0.1.nip.io", "0x7f.1", "127"],
)
def test_network_needs_tls_and_a_token(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(UsageError, match="--tls-cert"):
        check_exposure(host, tls=False, authenticated=True, insecure=False)
    with pytest.raises(UsageError, match="token create"):
        check_exposure(host, tls=True, authenticated=False, insecure=False)
    check_exposure(host, tls=True, authenticated=True, insecure=False)
    check_exposure(host, tls=False, authenticated=False, insecure=True)
