"""Three AdamW steps through the blocks of a bundle: ``python block_steps.py BUNDLE ENGINE``, on any machine.

Prints losses, a few numbers of each matrix that was learnt, and of what the blocks then give token by token, as JSON.
It needs the device's package and no torch.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import numpy as np

from dlora.edge.adapters.kind import Parameter
from dlora.edge.adapters.lora import LoraGroup, LoraModule
from dlora.edge.adapters.units import AdapterSet, Unit
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.choose import make_engine
from dlora.edge.model.blocks import DeviceBlocks
from dlora.edge.model.decode_blocks import DecodeBlocks
from dlora.edge.model.device_lora import DeviceLora
from dlora.edge.training.optimizer import AdamW
from dlora.edge.training.resolved import ChosenOptimizer
from dlora.protocol.adapters import AdapterSpec
from dlora.protocol.groups import GroupSpec, TargetSpec

STEPS, RANK, SCALING = 3, 3, 2.0
LENGTHS = np.array([8, 5], np.int32)
LABELLED = np.array([1, 3, 4, 5, 6, 7, 9, 10, 11, 12], np.int32)  # rows of the tokens that have a label
PIECES = (slice(0, 5), slice(5, 6), slice(6, 8))


def main() -> None:
    bundle = Bundle.open(Path(sys.argv[1]))
    engine = make_engine(bundle, sys.argv[2], 1)  # type: ignore[arg-type]
    blocks = DeviceBlocks(bundle, engine, 2, RANK)
    # Not numpy's normal numbers, which take a logarithm of each machine's own.
    random = np.random.default_rng(0)
    shapes = blocks.parameter_shapes
    drawn = {name: random.random(shape, np.float32) - np.float32(0.5) for name, shape in shapes.items()}
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in drawn))
    modules = [
        LoraModule(name, *(Parameter.of(drawn[f"{name}.{half}"]) for half in ("lora_A", "lora_B"))) for name in names
    ]
    group = GroupSpec(0, 1, (TargetSpec("one", 1),))
    adapters = AdapterSet(AdapterSpec(), [group], [LoraGroup(modules, 1.0)], [Unit((0,))], scaling=1.0, kill_every=1)
    optimizer = AdamW(engine, ChosenOptimizer(lr=1e-3, weight_decay=0.1, schedule="constant", warmup=0.0), STEPS)
    size = int(LENGTHS.sum()), bundle.manifest.base_model.hidden_size
    x, target = (random.random(size, np.float32) * 4 - 2 for _ in range(2))
    target = target[LABELLED]
    losses = []
    for step in range(STEPS):
        values = {name: parameter.value for name, parameter in adapters.parameters().items()}
        last, kept = blocks.forward(x, LENGTHS, LABELLED, values, SCALING)
        losses.append(float(np.square(last - target, dtype=np.float64).sum() / 2))
        for name, grad in blocks.backward(last - target, kept, values, SCALING).items():
            adapters.parameters()[name].grad = grad
        optimizer.step(adapters, lr=optimizer.lr(step))
    values = {name: parameter.value for name, parameter in adapters.parameters().items()}
    decoding = DecodeBlocks(bundle, engine, 2, DeviceLora(values, RANK))
    values["token by token"] = np.concatenate([decoding.append(x[part]) for part in PIECES])
    learnt = {name: value.reshape(-1)[::7].tolist() for name, value in values.items()}
    print(json.dumps({"machine": platform.machine(), "losses": losses, "learnt": learnt}))


if __name__ == "__main__":
    main()
