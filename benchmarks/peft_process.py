"""PEFT LoRA training in one process, a step a JSON line: what benchmarks compare the split with.

Reads {"ids": [[…]], "labels": [[…]]} and answers {"step_s": …, "loss": …}; -100 in labels is no label.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model

from dlora.cloud.model.base_model import load_base_model


def main(model: str, threads: int, targets: str, rank: int, alpha: float, lr: float, dtype: str = "float32") -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(threads)
    base = load_base_model(model, getattr(torch, dtype)).model
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets.split(","), task_type="CAUSAL_LM")
    wrapped = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    for line in sys.stdin:
        request = json.loads(line)
        ids, labels = torch.tensor(request["ids"]), torch.tensor(request["labels"])
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = wrapped(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        print(json.dumps({"step_s": time.perf_counter() - started, "loss": loss.item()}), flush=True)


if __name__ == "__main__":
    model, threads, targets, rank, alpha, lr, *dtype = sys.argv[1:]
    main(model, int(threads), targets, int(rank), float(alpha), float(lr), *dtype)
