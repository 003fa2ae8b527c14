"""A model that transformers divides by its own plan (``tp_plan``), for ``tensor_parallel.py``: asked on standard input,
this process starts the others, which do the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensor_parallel import there_and_back
from transformers import AutoModelForCausalLM, PreTrainedModel

END = 0


def main(folder: str, processes: str, rank: str = "0", store: str = "") -> None:
    """Answer each line, which has a number of tokens, with the seconds that they take; rank 0 does."""
    torch.set_num_threads(1)
    with _store(store) as path, _others(folder, int(processes), rank, path):
        dist.init_process_group(
            "gloo", store=dist.FileStore(path, int(processes)), rank=int(rank), world_size=int(processes)
        )
        os.environ |= {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, tp_plan="auto")
        model.eval().requires_grad_(False)
        while tokens := _next_tokens(rank):
            try:
                answer = {"seconds": _run(model, tokens)}
            except RuntimeError as error:  # heads that cannot be divided
                answer = {"error": str(error).splitlines()[0]}
            if rank == "0":
                print(json.dumps(answer), flush=True)
        dist.destroy_process_group()


def _run(model: PreTrainedModel, tokens: int) -> float:
    embeds = torch.ones(1, tokens, model.config.hidden_size, dtype=torch.bfloat16)
    return there_and_back(lambda x: model.base_model(inputs_embeds=x, use_cache=False).last_hidden_state, embeds)


def _next_tokens(rank: str) -> int:
    told = torch.zeros(1, dtype=torch.long)
    if rank == "0":
        line = sys.stdin.readline()
        told[0] = json.loads(line)["tokens"] if line else END
    dist.broadcast(told, 0)
    return int(told)


@contextmanager
def _store(given: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield given or str(Path(folder) / "store")


@contextmanager
def _others(folder: str, processes: int, rank: str, store: str) -> Iterator[None]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    numbers = range(1, processes) if rank == "0" else ()
    command: list[Any] = [sys.executable, __file__, folder, str(processes)]
    started = [subprocess.Popen([*command, str(number), store], stdin=subprocess.DEVNULL) for number in numbers]
    yield
    for process in started:
        process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
