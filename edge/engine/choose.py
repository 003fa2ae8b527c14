"""Which engine runs a bundle's graphs. Each is imported only when it is used."""

from __future__ import annotations

import importlib.util
from typing import Final

from dlora.edge.choices import EngineChoice, EngineName
from dlora.protocol.command import missing_extra
from dlora.protocol.errors import BundleError, MissingExtraError

from .bundle import Bundle
from .engine import Engine
from .shim import find_shim

ENGINES: Final[tuple[EngineName, ...]] = ("onnx", "executorch")  # in the order of preference


def make_engine(bundle: Bundle, name: EngineChoice = "auto", threads: int = 0) -> Engine:
    """The engine of that name; ``auto``: the first that both the bundle and the device have.

    Raises ``BundleError`` where the bundle has no graphs for it, and ``MissingExtraError`` where the device lacks it.
    """
    if name == "auto":
        name = (usable_engines(bundle) or _wanted(bundle))[0]
    if name not in bundle.manifest.engines:
        raise BundleError(f"{bundle.path} has no {name} graphs; export it again with --engine both")
    if name == "executorch":
        from .executorch_engine import ExecutorchEngine

        return ExecutorchEngine(bundle, threads)
    try:
        from .onnx_engine import OnnxEngine
    except ImportError as error:
        raise missing_extra(error, "edge") from None
    return OnnxEngine(bundle, threads)


def load_libraries(bundle: Bundle, name: EngineChoice) -> None:
    """Load what ``make_engine`` will need of ONNX Runtime, where it is there."""
    if name != "executorch" and "onnx" in usable_engines(bundle):
        importlib.import_module("onnxruntime")


def usable_engines(bundle: Bundle) -> list[EngineName]:
    """The engines that both the bundle and the device have."""
    return [name for name in _wanted(bundle) if is_installed(name)]


def is_installed(name: EngineName) -> bool:
    """Whether the device has an engine; nothing is loaded."""
    if name == "onnx":
        return importlib.util.find_spec("onnxruntime") is not None
    try:
        find_shim()
    except MissingExtraError:
        return False
    return True


def _wanted(bundle: Bundle) -> list[EngineName]:
    wanted = [name for name in ENGINES if name in bundle.manifest.engines]
    if not wanted:
        raise BundleError(f"{bundle.path} has graphs for no engine of this dlora; export it again")
    return wanted
