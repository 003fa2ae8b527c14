"""Part of ``trunk.py``: whether PEFT finds the loss that a device with blocks does, by how those are stored."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from bars import Entry, at_most
from children import log, need_bundle, run_json

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from dialogue import write_dialogue

PEFT_CHECK: Final = Path(__file__).parents[1] / "examples" / "peft_check.py"
BARS: Final = {"fp32": 1e-4, "fp16": 2e-3}
"""How far the two losses may be apart. PEFT has the weights unrounded: of integers it is said how far."""
MAX_LENGTH: Final = 512  # of peft_check.py as well
ROWS: Final = 48
STEPS: Final = 6
HIGH_LR: Final = 5e-3  # so few steps are to move the loss far away from the base model's


def measure_losses(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """The loss on held-out dialogue, on the device and in PEFT, in nats a label."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        data, held_out = write_dialogue(work, ROWS, seed=0)
        for dtype, bundle in options.bundles.items():
            adapter = work / dtype
            wire = "fp32" if dtype == "fp32" else "fp16"
            command = [
                "-m", "dlora.edge", "train", "--device-blocks", options.blocks, "--bundle",
                need_bundle(bundle), "--server", url, "--data", data, "--eval", held_out, "--out", adapter,
                "--batch-size", options.batch_size, "--steps", STEPS, "--lr", HIGH_LR, "--threads", options.threads,
                "--max-length", MAX_LENGTH, "--seed", 0, "--wire-dtype", wire, "--active-fraction", 1, "--json",
            ]  # fmt: skip
            summary, in_peft = run_json(*command), run_json(PEFT_CHECK, options.model, adapter, bundle, held_out)
            before, after = summary["eval_loss_before"], summary["eval_loss_after"]
            apart = abs(after - in_peft["loss"])
            found[dtype] = {"before": before, "loss": after, "peft_loss": in_peft["loss"], "difference": apart}
            log(f"{dtype}: {before:.5f} → {after:.5f}, in PEFT {in_peft['loss']:.5f}, {apart:.1e} apart")
    return found


def bars_of_losses(found: dict[str, Any], command: str) -> dict[str, Entry]:
    """Of what is not rounded."""
    return {f"peft_{dtype}": at_most(bar, found[dtype]["difference"], command) for dtype, bar in BARS.items()}

