"""What packaging/ has for containers, Kubernetes and systemd, by the programs that read it; and that the files agree.

Where a program is not installed its test is skipped, and says which one it is: ``pip install --group packaging`` brings
three of them, Debian's packages kubernetes-client, haproxy, prometheus and systemd the others.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from tools import find_tool

import dlora.cloud.commands.app

PACKAGING = Path(__file__).parents[1] / "packaging"
CONTAINERFILES = sorted(PACKAGING.glob("*.Containerfile"))
COMPOSE_SETTINGS = {"GRAFANA_PASSWORD": "x", "DLORA_MODEL": "/models/m", "DLORA_TLS_CERT": "/tls/server.pem"}
UNIT = PACKAGING / "dlora-cloud@.service"


def said(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a program says, which must be there."""
    command = [find_tool(name, in_ci=False), *map(str, arguments)]
    settings = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings, check=False)


def well(name: str, *arguments: object, **environment: str) -> str:
    done = said(name, *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(path: Path, tmp_path: Path) -> None:
    assert well("hadolint", path) == ""
    worse = tmp_path / "Containerfile"
    worse.write_text(path.read_text().replace('ENTRYPOINT ["', "ENTRYPOINT /bin/").replace('"]\nCMD', "\nCMD"))
    assert "DL3025" in said("hadolint", worse).stdout  # in exec form signals come through


def test_compose_reads_its_file() -> None:
    file = ["-f", PACKAGING / "compose.yaml", "config"]
    well("docker-compose", *file, "--quiet", **COMPOSE_SETTINGS)
    for name in COMPOSE_SETTINGS:
        assert name in said("docker-compose", *file, "--quiet", **(COMPOSE_SETTINGS | {name: ""})).stderr


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """With all references followed."""
    file = PACKAGING / "compose.yaml"
    text = well("docker-compose", "-f", file, "config", "--format", "json", **COMPOSE_SETTINGS)
    made: dict[str, Any] = json.loads(text)["services"]
    return made


@pytest.fixture(scope="module")
def kubernetes() -> str:
    return well("kubectl", "kustomize", PACKAGING)


def objects(text: str) -> dict[tuple[str, str], Any]:
    """By kind and name."""
    return {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(text)}


def test_kubernetes_takes_every_object(kubernetes: str, tmp_path: Path) -> None:
    file = tmp_path / "all.yaml"
    file.write_text(kubernetes)
    well("kubernetes-validate", "--strict", file)
    file.write_text(kubernetes.replace("readOnlyRootFilesystem", "readOnlyRoot"))
    assert said("kubernetes-validate", "--strict", file).returncode != 0


def test_every_pod_is_locked(kubernetes: str) -> None:
    """As Kubernetes' standard "restricted" asks, which the namespace enforces; and with read-only file systems."""
    made = objects(kubernetes)
    assert made["Namespace", "dlora"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pods = [each["spec"]["template"]["spec"] for each in made.values() if "template" in each.get("spec", {})]
    assert len(pods) == 3
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]


def serve_options() -> dict[str, Any]:
    """Of ``dlora-cloud serve``, with their defaults."""
    command: Any = typer.main.get_command(dlora.cloud.commands.app.app)
    return {name: parameter.default for parameter in command.commands["serve"].params for name in parameter.opts}


def test_a_server_may_drain_before_it_is_killed(kubernetes: str, compose: dict[str, Any]) -> None:
    drain_s = serve_options()["--drain-s"]
    pod = objects(kubernetes)["StatefulSet", "dlora-cloud"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > drain_s
    server = pod["containers"][0]
    assert server["livenessProbe"]["periodSeconds"] * (server["livenessProbe"]["failureThreshold"] - 1) > drain_s
    assert server["readinessProbe"]["periodSeconds"] * server["readinessProbe"]["failureThreshold"] < drain_s
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.M)[1]) > drain_s  # type: ignore[index]
    for name in ("replica1", "replica2"):
        assert compose[name]["stop_grace_period"] == "1m0s"
    assert drain_s < 60


def test_options_and_variables_exist(kubernetes: str, compose: dict[str, Any]) -> None:
    server = objects(kubernetes)["StatefulSet", "dlora-cloud"]["spec"]["template"]["spec"]["containers"][0]
    for words in (server["args"], compose["replica1"]["command"], UNIT.read_text().split()):
        named = {word.partition("=")[0] for word in words if word.startswith("--") and word != "--drain-s."}
        assert named
        assert named <= set(serve_options())
    haproxy = objects(kubernetes)["Deployment", "haproxy"]["spec"]["template"]["spec"]["containers"][0]
    known = set(re.findall(r"\bDLORA_\w+\b", (PACKAGING / "haproxy.cfg").read_text()))
    for variables in ({each["name"] for each in haproxy["env"]}, set(compose["haproxy"]["environment"])):
        assert {name for name in variables if name.startswith("DLORA_")} <= known
        assert {"DLORA_REPLICA_1", "DLORA_REPLICA_2", "DLORA_TLS_CERT"} <= variables


def test_names_and_ports_lead_somewhere(kubernetes: str, compose: dict[str, Any]) -> None:
    """Those of HAProxy's servers, of the ledger and of what Prometheus scrapes."""
    made = objects(kubernetes)
    haproxy = made["Deployment", "haproxy"]["spec"]["template"]["spec"]["containers"][0]
    there = {each["name"]: each["value"] for each in haproxy["env"]}
    for variables, known in (
        (there, made),
        (compose["haproxy"]["environment"], {("Service", name) for name in compose}),
    ):
        for number in (1, 2):
            name, _, port = variables[f"DLORA_REPLICA_{number}"].partition(":")
            assert ("Service", name) in known
            assert int(port) == serve_options()["--port"]
        assert ("Service", "valkey") in known
    targets = yaml.safe_load((PACKAGING / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert targets["targets"] == ["replica1:9464", "replica2:9464"]
    assert "--metrics 0.0.0.0:9464" in " ".join(compose["replica1"]["command"])
    trusted = compose["replica1"]["command"][compose["replica1"]["command"].index("--trusted-proxy") + 1]
    assert compose["haproxy"]["networks"]["servers"]["ipv4_address"] == trusted
    for service in compose.values():
        for volume in service["volumes"]:
            if volume["type"] == "bind" and Path(volume["source"]).is_relative_to(PACKAGING):
                assert Path(volume["source"]).is_file()


def test_prometheus_reads_its_file() -> None:
    assert "rules found" in well("promtool", "check", "config", PACKAGING / "prometheus.yml")


def test_haproxy_reads_the_configuration_of_kubernetes(kubernetes: str, tmp_path: Path) -> None:
    """It is the file of packaging/ itself, with what the Deployment sets."""
    (text,) = (each["data"]["haproxy.cfg"] for (kind, _), each in objects(kubernetes).items() if kind == "ConfigMap")
    assert text == (PACKAGING / "haproxy.cfg").read_text()
    (tmp_path / "haproxy.cfg").write_text(text)
    settings = {"DLORA_BIND": "*:8443", "DLORA_REPLICA_1": "replica1:8765", "DLORA_REPLICA_2": "replica2:8765"}
    well("haproxy", "-c", "-f", tmp_path / "haproxy.cfg", **settings)


def test_systemd_takes_the_template_unit(tmp_path: Path) -> None:
    units = tmp_path / "etc/systemd/system"
    units.mkdir(parents=True)
    program = tmp_path / "opt/dlora/bin/dlora-cloud"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for target in ("sysinit", "basic", "shutdown", "network-online"):
        (units / f"{target}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    verify = ["verify", f"--root={tmp_path}", "--man=no", "dlora-cloud@8765.service"]
    (units / UNIT.name).write_text(UNIT.read_text())
    done = said("systemd-analyze", *verify)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "dlora-cloud" in line]) == (0, [])
    (units / UNIT.name).write_text(UNIT.read_text().replace("StateDirectoryMode", "StateDirectoryMood"))
    assert "StateDirectoryMood" in said("systemd-analyze", *verify).stderr


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program is not installed"):
        find_tool("no-such-program")
    monkeypatch.setenv("CI", "1")
    with pytest.raises(AssertionError, match="no-such-program"):
        find_tool("no-such-program")
    with pytest.raises(pytest.skip.Exception, match="no-such-program"):
        find_tool("no-such-program", in_ci=False)
