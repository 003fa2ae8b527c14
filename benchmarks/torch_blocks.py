"""The last blocks of a model, trained by torch and PEFT in one process from given hidden states: what blocks on a
device are compared with.

Reads {"hidden_states": FILE, "labels": [[…]]} and answers {"step_s": …, "loss": …}; FILE is .npy, (sequences, length,
width), -100 in labels is no label.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from dlora.cloud.model.base_model import load_base_model
from dlora.cloud.model.parts import ModelParts


def main(model: str, threads: int, blocks: int, rank: int, alpha: float, lr: float) -> None:
    """Answer requests until stdin ends."""
    torch.set_num_threads(threads)
    base = load_base_model(model)
    parts, first = ModelParts(base), base.blocks - blocks
    names = [name for name, target in base.targets.items() if target.block >= first]
    wrapped = get_peft_model(base.model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)).train()
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    for line in sys.stdin:
        request = json.loads(line)
        hidden_states = torch.from_numpy(np.load(request["hidden_states"]))
        labels = torch.tensor(request["labels"])
        started = time.perf_counter()
        optimizer.zero_grad()
        last = parts.run(hidden_states, begin=first)[:, :-1]
        wanted = labels[:, 1:]
        labelled = wanted != -100
        # Labelled rows only, as on the device: a head over all would be most of the step.
        logits = base.lm_head(last[labelled])
        loss = torch.nn.functional.cross_entropy(logits, wanted[labelled])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        print(json.dumps({"step_s": time.perf_counter() - started, "loss": loss.item()}), flush=True)


if __name__ == "__main__":
    main(*[kind(word) for kind, word in zip((str, int, int, int, float, float), sys.argv[1:], strict=True)])  # type: ignore[operator]
