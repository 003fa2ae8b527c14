"""The images of packaging/: built, and run with a read-only root file system, without root or any capability.

No image registry is asked: the base is made of Debian's packages and this Python, as Docker's own Python image is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import CloudProcess, Finished, run_edge
from tiny import TinyFactory
from tools import find_tool

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.release, pytest.mark.timeout(3600)]
# A container may have no more than the machine's own limits, which are lower than what podman asks for on some.
LIMITS = ["--ulimit", "nofile=20000:20000", "--ulimit", "nproc=90000:90000"]
LOCKED = [
    "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges",
]  # fmt: skip


@dataclass(frozen=True)
class Images:
    """All images and containers lie under ``directory``."""

    directory: Path

    def podman(self, *arguments: object) -> list[str]:
        runtime = ["--cgroup-manager", "cgroupfs", "--runtime", "runc"]
        return [find_tool("podman"), *self._store, *runtime, *map(str, arguments)]

    def run(self, image: str, *arguments: object, options: tuple[object, ...] = (), **environment: str) -> Finished:
        """To its end."""
        command = self.podman("run", "--rm", *LIMITS, *LOCKED, *options, f"localhost/{image}", *arguments)
        done = _done(*command, **environment)
        return Finished(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def server(self, name: str, *arguments: object, options: tuple[object, ...]) -> Iterator[CloudProcess]:
        """A container that serves; a signal for ``podman run`` goes to what runs in it."""
        log = self.directory / f"{name}.log"
        command = self.podman("run", "--rm", "--name", name, *LIMITS, *LOCKED, *options, "localhost/cloud", *arguments)
        with (
            log.open("w") as stderr,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
        ):
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line, log.read_text()
                yield CloudProcess(process, json.loads(line), log)
            finally:
                _done(*self.podman("rm", "--force", "--ignore", name))

    def build(self, image: str) -> None:
        """From packaging/, with this machine's way to PyPI."""
        options = ["--isolation=chroot", "--format=docker", *LIMITS, *self._pip(), "--build-arg=TORCH_INDEX="]
        bases = [f"--build-arg={name}=localhost/base" for name in ("BASE", "RUNTIME")]
        file = f"--file={ROOT / 'packaging' / image}.Containerfile"
        _well(find_tool("buildah"), *self._store, "bud", *options, *bases, file, f"--tag={image}", str(ROOT))

    def make_base(self) -> None:
        """Debian's newest with Python's libraries, and this interpreter in /usr/local where it is not Debian's own."""
        settings, base, prefix = self.directory / "apt.conf", self.directory / "base.tar", Path(sys.base_prefix)
        settings.write_text(_well("apt-config", "dump", "--no-empty", "Acquire").stdout)
        ours = f"tar -C {prefix} --exclude=site-packages --exclude=test --exclude='*.a' -c bin lib"
        hooks = [] if prefix == Path("/usr") else [f'--customize-hook={ours} | tar -C "$1/usr/local" -x']
        hooks.append('--customize-hook=chroot "$1" ldconfig')
        include = "--include=ca-certificates,python3-venv"
        _well(find_tool("mmdebstrap"), "--variant=apt", f"--aptopt={settings}", include, *hooks, "trixie", str(base))
        _well(*self.podman("import", base, "localhost/base"))

    @property
    def _store(self) -> list[str]:
        store = ["--root", str(self.directory / "store"), "--runroot", str(self.directory / "run")]
        return ["--storage-driver", "vfs", *store]

    def _pip(self) -> list[str]:
        """pip's settings as a secret; the files and folders that they name are mounted under /host."""
        settings, volumes = ["[global]"], []
        for line in _well(sys.executable, "-m", "pip", "config", "list").stdout.splitlines():
            key, _, value = line.partition("=")
            words = value.strip("'").split()
            volumes += [f"--volume={word}:/host{word}:ro" for word in words if Path(word).exists()]
            here = " ".join(f"/host{word}" if Path(word).exists() else word for word in words)
            settings.append(f"{key.rpartition('.')[2]} = {here}")
        secret = self.directory / "pip.conf"
        secret.write_text("\n".join(dict.fromkeys(settings)))
        return [f"--secret=id=pip.conf,src={secret}", *dict.fromkeys(volumes)]


def _done(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    said = {**os.environ, "PODMAN_IGNORE_CGROUPSV1_WARNING": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=said, check=False)


def _well(*command: str) -> subprocess.CompletedProcess[str]:
    done = _done(*command)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Images]:
    """They are made as root, of whom a machine lets podman's runtime have what it asks for."""
    if os.geteuid():
        pytest.skip("images are built as root here")
    for name in ("buildah", "podman", "runc", "mmdebstrap"):
        find_tool(name)
    made = Images(tmp_path_factory.mktemp("images"))
    made.make_base()
    yield made
    shutil.rmtree(made.directory)  # gigabytes


@pytest.fixture(scope="module")
def model(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Readable for the container's user, whom ``save_pretrained`` shuts out."""
    copy = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(tiny().model, copy)
    for path in copy.iterdir():
        path.chmod(0o644)
    return copy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    texts = [" ".join(f"w{(7 * row + word) % 89}" for word in range(6)) for row in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def cloud(images: Images) -> Images:
    images.build("cloud")
    return images


def test_the_server_trains_devices_of_both_kinds(
    cloud: Images, model: Path, data: Path, tiny: TinyFactory, tmp_path: Path
) -> None:
    """One of this machine, and the edge image, with a token of the volume; then the server drains."""
    cloud.build("edge")
    state = ("--volume=state:/var/lib/dlora-cloud", f"--volume={model}:/model:ro", "--network=host")
    token = cloud.run("cloud", "token", "create", "--device", "phone", options=state)
    assert token.code == 0, token.stderr
    serve = ("serve", "/model", "--port", "0", "--threads", "1", "--json")
    with cloud.server("cloud", *serve, options=state) as server:
        run = ["--server", server.url, "--steps", 3, "--batch-size", 2, "--seed", 0, "--threads", 1, "--save-every", 1]
        here = tmp_path / "adapter"
        assert run_edge("train", "--bundle", tiny().bundle, "--data", data, "--out", here, *run).code == 8
        given = {"DLORA_TOKEN": token.stdout.split()[0]}
        done = run_edge("train", "--bundle", tiny().bundle, "--data", data, "--out", here, *run, **given)
        assert done.code == 0, done.stderr

        volume = tmp_path / "device"
        shutil.copytree(tiny().bundle, volume / "bundle")
        shutil.copy(data, volume)
        for path in (volume, *volume.rglob("*")):
            os.chown(path, 10001, 10001)
        device = (f"--volume={volume}:/var/lib/dlora-edge", "--network=host", "--env=DLORA_TOKEN")
        there = ("--bundle", "bundle", "--data", data.name, "--out", "adapter")
        trained = cloud.run("edge", "train", *there, *run, options=device, **given)
        assert trained.code == 0, trained.stderr
        assert _losses(volume / "adapter") == pytest.approx(_losses(here), rel=1e-4)
        assert (volume / "adapter" / "adapter_model.safetensors").stat().st_uid == 10001

        assert _well(*cloud.podman("exec", "cloud", "id", "-u")).stdout == "10001\n"
        refused_write = _done(*cloud.podman("exec", "cloud", "touch", "/opt/dlora/written"))
        assert "Read-only file system" in refused_write.stderr
        assert server.end() == 0
    assert "stopping: " in server.log.read_text()


def _losses(out: Path) -> list[float]:
    found = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(found) == 3
    return found


def test_the_image_says_whether_its_server_is_well(cloud: Images, model: Path) -> None:
    """Alone with its loopback, so that it can have the port that the check asks."""
    options = (f"--volume={model}:/model:ro", "--network=none")
    with cloud.server("checked", "serve", "/model", "--threads", "1", "--json", options=options):
        assert _done(*cloud.podman("healthcheck", "run", "checked")).returncode == 0
    with cloud.server("elsewhere", "serve", "/model", "--port", "8766", "--json", options=options):
        assert _done(*cloud.podman("healthcheck", "run", "elsewhere")).returncode == 1
