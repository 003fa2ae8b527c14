"""The bundle's graphs on ONNX Runtime, tuned for little memory."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Final

import onnxruntime as ort

from dlora.edge.memory import limit_memory
from dlora.protocol.errors import BundleError
from dlora.protocol.manifest import GraphKind, GraphSpec

from .bundle import Bundle
from .engine import OF_BLOCKS, Array, Graph, check_inputs, check_tensors
from .onnx_check import MAX_GRAPH_BYTES, check_graph

# Waking a thread takes as long as half of a narrow adapter's graph: up to this width a second one makes it slower.
_NARROW = 1024
# The key under which a tensor in a graph says that its data lie in another file, anywhere on this device: ONNX Runtime
# before 1.24 reads it. protobuf writes strings as they are, so a graph without these bytes names none.
_NAMES_A_FILE: Final = b"location"
_SPARE_BITS: Final = 6  # a sixty-fourth more of inputs than ever before is as good as none
_REASON_CHARACTERS: Final = 200


class OnnxEngine:
    """Stock ``onnxruntime`` on the CPU.

    The memory arena and weight prepacking are off: at their defaults they cost more than all of a small model's
    training (+216 MB). Threads do not spin while they wait: the server may share these cores. Each session has threads
    of its own, so graphs that are too small for them get none.
    """

    name = "onnx"

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self._bundle = bundle
        self._threads = threads
        self.description = f"onnxruntime {ort.__version__}"

    def load(self, kind: GraphKind, key: str = "") -> Graph:
        """Load one graph. Raises ``BundleError`` where ONNX Runtime cannot."""
        spec, path = self._bundle.graph_file(kind, key, self.name)
        options = _options(self._threads if _is_large(spec) else 1)
        try:
            # No more than that: a sparse file may be of any size.
            with path.open("rb") as file:
                content = file.read(MAX_GRAPH_BYTES + 1)
        except OSError as error:
            raise BundleError(f"{path} cannot be read ({error.strerror}); export the bundle again") from None
        if _NAMES_A_FILE in content:
            raise BundleError(f"{path} takes data from another file, which no graph may; do not use this bundle")
        try:
            check_graph(content)
        except ValueError as error:
            raise BundleError(f"{path} has {error}, which no graph may; export the bundle again") from None
        try:
            with limit_memory():
                session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise BundleError(
                f"{path} does not load on {self.description}: {_reason(error)}; export it again"
            ) from None
        names = [output.name for output in spec.outputs]
        most = 0

        def run(inputs: Mapping[str, Array]) -> list[Array]:
            nonlocal most
            _, sizes = check_inputs(spec, inputs)
            size = sum(array.nbytes for array in inputs.values())
            try:
                # Looking at the memory takes as long as a small graph: only where more goes in than ever before, and
                # not for each token of an answer, with which keys and values grow.
                with limit_memory() if size > most else nullcontext():
                    outputs: list[Array] = session.run(names, dict(inputs))
            except Exception as error:
                raise BundleError(
                    f"{path} fails on {self.description}: {_reason(error)}; close other programs if it needs their "
                    "memory, or export the bundle again"
                ) from None
            most = max(most, size + (size >> _SPARE_BITS))
            check_tensors(spec.outputs, outputs, sizes)
            return outputs

        return run


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= _REASON_CHARACTERS else f"… {lines[0][-_REASON_CHARACTERS:]}"


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors are told by us, in one line
    options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file looks like
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _is_large(spec: GraphSpec) -> bool:
    """Whether a call is long enough for threads to help."""
    if spec.kind.startswith("adapter_"):
        return any(isinstance(size, int) and size > _NARROW for tensor in spec.inputs for size in tensor.shape)
    return spec.kind.startswith(("head_", *OF_BLOCKS))
