"""Checks this device and says what to do about each problem."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from dlora.edge.engine.choose import is_installed
from dlora.edge.engine.shim import VARIABLE, load_shim
from dlora.edge.run.footprint import tokens_that_fit, training_mb, usual_tokens
from dlora.edge.run.run_file import LIBRARIES, versions
from dlora.edge.training.defaults import DEFAULT_KIND
from dlora.edge.wire.credentials import Credentials
from dlora.protocol.device_memory import RUNTIME_MB, STORED_DTYPES
from dlora.protocol.errors import DloraError
from dlora.protocol.version import PROTOCOL_VERSIONS, SOFTWARE_VERSION


def run_checks(bundle: Path | None, server: str | None, credentials: Credentials) -> dict[str, Any]:
    """Run every check; one that fails carries what to do."""
    checks = [
        _check("python", _python),
        _check("libraries", _libraries),
        _check("no torch", _no_torch),
        _check("memory", lambda: _memory(bundle)),
        _check("engine", _engine),
        _check("executorch", _executorch),
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
        raise _ProblemError(
            f"{machine}, 32 bits: onnxruntime has no build for it; use a 64-bit system, where getconf LONG_BIT says 64"
        )
    return f"{platform.python_version()} on {platform.system()} {machine}"


def _libraries() -> str:
    found = versions()
    return ", ".join(f"{name} {found[name] or 'is not installed'}" for name in LIBRARIES)


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

    try:
        manifest = load_manifest(bundle)
    except DloraError:  # which the check of the bundle tells
        return found
    fit, tokens = tokens_that_fit(manifest, available), usual_tokens(manifest)
    others = ", ".join(
        f"{dtype} {training_mb(manifest, tokens, dtype):,.0f}"
        for dtype in STORED_DTYPES
        if dtype != manifest.head.dtype
    )
    found += (
        f"; training a {DEFAULT_KIND} with this {manifest.head.dtype} head takes about "
        f"{training_mb(manifest, tokens):,.0f} MB at "
        f"{tokens} tokens a micro-batch, mapped weights included (other heads: {others})"
    )
    if not fit:
        raise _ProblemError(f"{found}: close other programs, or export with --head-dtype int8 or int4")
    longest = manifest.base_model.max_sequence_length
    return f"{found}; up to {fit:,} tokens fit" + (f", {longest:,} of them a sequence" if longest < fit else "")


def _engine() -> str:
    try:
        import onnxruntime as ort
    except ImportError:
        if is_installed("executorch"):
            return "onnxruntime is not installed; only --engine executorch works"
        raise _ProblemError("there is no engine: pip install 'dlora[edge]' brings onnxruntime") from None
    return f"onnxruntime {ort.__version__} ({', '.join(ort.get_available_providers())})"


def _executorch() -> str:
    if not is_installed("executorch") and not os.environ.get(VARIABLE):
        return "not installed; only --engine executorch needs it"
    shim = load_shim()
    return f"ExecuTorch {shim.version} in {shim.directory}"


def _bundle(path: Path) -> str:
    from dlora.edge.engine.bundle import Bundle

    manifest = Bundle.open(path, verify=True).manifest
    engines = " and ".join(manifest.engines)
    return f"{path}: {manifest.base_model.name}, {len(manifest.files)} files, every digest right, for {engines}"


def _server(url: str, bundle: Path | None, credentials: Credentials) -> str:
    from dlora.edge.adapters.compatibility import check_base_model
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.wire.connecting import ConnectSettings
    from dlora.edge.wire.connection import Connection

    with Connection(url, ConnectSettings(credentials)) as connection:
        welcome = connection.welcome
        if bundle is not None:
            check_base_model(Bundle.open(bundle), welcome)
        return f"{url}: {welcome.software}, {welcome.base_model}, wire version {welcome.protocol_version}"
