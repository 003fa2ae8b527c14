"""How a command loads torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dlora.protocol.errors import UsageError


def start_torch(device: str, threads: int, processes: int = 1) -> int:
    """Load torch, as a process needs it that shares its cores with others; the threads that each of ``processes``
    computes with, a GPU each.

    Raises ``UsageError`` without that device.
    """
    # Idle OpenMP threads spin: with a device on the same cores that made a step 15 times slower. Must be set
    # before torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    import torch

    gpus = torch.cuda.device_count()
    check_device(device, gpus)
    if device != "cpu" and processes > gpus:
        raise UsageError(f"--tensor-parallel {processes}: torch sees {gpus} CUDA devices here; each process has one")
    threads = threads or max(1, torch.get_num_threads() // processes)
    torch.set_num_threads(threads)
    return threads


def computes_bfloat16(device: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether ``device`` has instructions for products in bfloat16; without them they are slower than in float32."""
    if device != "cpu":
        import torch

        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return not words.isdisjoint({"amx_bf16", "avx512_bf16", "bf16"})  # the last is ARM's


def check_device(device: str, gpus: int) -> None:
    """Raise ``UsageError`` unless a model can be put on ``device`` of a machine with that many GPUs."""
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,4}))?", device)
    if found is None:
        raise UsageError(f"--device {device!r} is no device; write cpu, cuda or cuda:N")
    if device != "cpu" and int(found[1] or 0) >= gpus:
        seen = f"{gpus} CUDA devices, from cuda:0 on," if gpus else "no CUDA device"
        raise UsageError(f"--device {device}: torch sees {seen} here; use --device cpu or another one")
