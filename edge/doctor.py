"""Checks this device and says what to do about each problem."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from dlora.protocol.errors import DloraError
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION

from .credentials import Credentials
from .report import one_line

LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "safetensors", "websockets", "msgspec")
RUNTIME_MB = 130  # what Python, ONNX Runtime and a tokenizer take before any weight is touched


def examine(bundle: Path | None, server: str | None, credentials: Credentials) -> dict[str, Any]:
    """Run every check; one that fails carries what to do."""
    checks = [
        _check("python", _python),
        _check("libraries", _libraries),
        _check("no torch", _no_torch),
        _check("memory", lambda: _memory(bundle)),
        _check("engine", _engine),
    ]
    if bundle is not None:
        checks.append(_check("bundle", lambda: _bundle(bundle)))
    if server is not None:
        checks.append(_check("server", lambda: _server(server, bundle, credentials)))
    return {
        "software": SOFTWARE_VERSION,
        "protocol_versions": list(PROTOCOL_VERSIONS),
        "ok": all(check["ok"] for check in checks),
        "checks": checks,
    }


def show(report: dict[str, Any]) -> None:
    """Print the checks for people."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(f"dlora-edge {report['software']}, wire versions {report['protocol_versions']}")
    for check in report["checks"]:
        mark = "[green]ok[/]     " if check["ok"] else "[red]PROBLEM[/]"
        found = escape(one_line(check["found"]))
        console.print(f"{mark} [bold]{check['check']}[/]: {found}", highlight=False, soft_wrap=True)


class _ProblemError(Exception):
    """A check failed; the text says what to do."""


def _check(name: str, find: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"check": name, "ok": True, "found": find()}
    except (_ProblemError, DloraError) as error:
        return {"check": name, "ok": False, "found": str(error)}


def _python() -> str:
    machine = platform.machine()
    if sys.maxsize < 2**32:
        raise _ProblemError(f"{machine}, 32 bits: onnxruntime has no build for it; use a 64-bit system")
    return f"{platform.python_version()} on {platform.system()} {machine}"


def _libraries() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)


def _no_torch() -> str:
    if "torch" in sys.modules:
        raise _ProblemError("torch is loaded in this process; something imports it that should not")
    return "torch is not loaded"


def _memory(bundle: Path | None) -> str:
    memory = psutil.virtual_memory()
    available = memory.available / 1e6
    found = f"{available:,.0f} MB available of {memory.total / 1e6:,.0f} MB, {psutil.cpu_count()} cores"
    if bundle is None:
        if available < RUNTIME_MB:
            raise _ProblemError(f"{found}; training takes {RUNTIME_MB} MB before any weight: close other programs")
        return found
    from dlora.protocol.manifest import load_manifest

    manifest = load_manifest(bundle)
    weights = sum(spec.bytes for name, spec in manifest.files.items() if name.endswith(".npy")) / 1e6
    adapters = sum(
        manifest.lora.r * (group.in_features + target.out_features) * 4 * 4
        for group in manifest.groups
        for target in group.targets
    )
    needed = RUNTIME_MB + adapters / 1e6
    found += f"; training takes about {needed:,.0f} MB, and up to {weights:,.0f} MB of reclaimable page cache"
    if available < needed:
        raise _ProblemError(f"{found}: close other programs, or export with a smaller --rank")
    return found


def _engine() -> str:
    import onnxruntime as ort

    return f"onnxruntime {ort.__version__} ({', '.join(ort.get_available_providers())})"


def _bundle(path: Path) -> str:
    from .bundle import Bundle

    manifest = Bundle.open(path).manifest
    return f"{path}: {manifest.base_model.name}, {len(manifest.files)} files, every digest right"


def _server(url: str, bundle: Path | None, credentials: Credentials) -> str:
    from .bundle import Bundle
    from .connection import Connection, Dialing
    from .trainer import check_base_model

    with Connection(url, Dialing(credentials)) as connection:
        welcome = connection.welcome
        if bundle is not None:
            check_base_model(Bundle.open(bundle), welcome)
        return f"{url}: {welcome.software}, {welcome.base_model}, wire version {welcome.protocol_version}"
