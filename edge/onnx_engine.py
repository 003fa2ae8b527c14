"""The bundle's graphs on ONNX Runtime, tuned for little memory."""

from __future__ import annotations

from collections.abc import Mapping

import onnxruntime as ort

from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import GraphKind

from .bundle import Bundle
from .engine import Array, Graph


class OnnxEngine:
    """Stock ``onnxruntime`` on the CPU.

    The memory arena and weight prepacking are off: at their defaults they cost more than all of a small model's
    training (+216 MB). Threads do not spin while they wait: the server may share these cores.
    """

    name = "onnx"

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self._bundle = bundle
        self._options = ort.SessionOptions()
        self._options.enable_cpu_mem_arena = False
        self._options.intra_op_num_threads = threads
        self._options.inter_op_num_threads = 1
        self._options.log_severity_level = 3
        self._options.add_session_config_entry("session.disable_prepacking", "1")
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.description = f"onnxruntime {ort.__version__}"

    def load(self, kind: GraphKind, key: str = "") -> Graph:
        """Load one graph. Raises ``BundleError`` where ONNX Runtime cannot."""
        _, path = self._bundle.graph_file(kind, key, self.name)
        try:
            session = ort.InferenceSession(path, self._options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common public base
            reason = str(error).splitlines()[0][:200]
            raise BundleError(f"{path} does not load on {self.description}: {reason}; export it again") from None

        def run(inputs: Mapping[str, Array]) -> list[Array]:
            outputs: list[Array] = session.run(None, dict(inputs))
            return outputs

        return run
