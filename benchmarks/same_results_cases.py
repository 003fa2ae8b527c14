"""The runs that same_results.py makes with both commits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

BLOCKS: Final = 4
STEPS: Final = 40
STOPPED_AFTER: Final = 12  # steps at least, of the run that is stopped
FIRST_PART: Final = 18  # steps of the run that is made longer

# Wide enough that the order in which numbers are summed shows in the last bits.
_LLAMA: Final = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": BLOCKS}
MODELS: Final[dict[str, dict[str, Any]]] = {
    "llama": _LLAMA,
    "gpt2": {"n_embd": 64, "n_layer": BLOCKS},
    "gemma2": {**_LLAMA, "head_dim": 16, "query_pre_attn_scalar": 16},
}
"""Hugging Face ``model_type`` to changes of its tiny config."""

RUN_OPTIONS: Final = {
    "--rank": "4",
    "--alpha": "8",
    "--batch-size": "4",
    "--grad-accum": "2",
    "--lr": "0.01",
    "--schedule": "cosine",
    "--weight-decay": "0.01",
    "--eval-every": "15",
    "--wire-dtype": "fp32",
    "--seed": "7",
    "--engine": "onnx",
    "--threads": "1",
}
# Killed from step 4 on, revived from step 16 on: see Timetable in protocol/kill_revive.py.
KILL_REVIVE: Final = {
    "--kr-score": "sensitivity",
    "--active-fraction": "0.5",
    "--set": "kill_revive.warmup_steps=4 kill_revive.kill_every=3 kill_revive.revive_every=6 kill_revive.probation=3",
}
RANDOM: Final = {**KILL_REVIVE, "--kr-score": "random"}
BY_GROUP: Final = {**KILL_REVIVE, "--kr-unit": "group", "--kr-score": "grad"}
FFA: Final = {"--kind": "ffa"}
OF_WEIGHTS: Final = {"--basis": "weights", "--active-from": "start"}
BOTTLENECK: Final = {"--kind": "bottleneck", "--rank": "8", "--wire-dtype": "int8", "--target-modules": "all-linear"}
FOUND_RATE: Final = {"--lr": ""}  # none is given: the run finds its own
TRUNK: Final = {"--device-blocks": "2", "--target-modules": "all-linear"}
LOCAL: Final = {"--device-blocks": "all", "--target-modules": "all-linear"}
QV: Final = "q_proj,v_proj"
ALL_OF_A_BLOCK: Final = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class Case:
    """A run of training.

    Attributes:
        bundle: options of the exporter.
        options: of ``dlora-edge train``, beside ``RUN_OPTIONS``; one is given once for each word of its value.
        way: in one go; stopped by a signal and resumed; ended, and then made longer; or by ``CLIENT``, without options.
        answers: whether the adapter is asked for answers afterwards.
    """

    name: str
    model: str
    options: Mapping[str, str]
    bundle: Mapping[str, str] = field(default_factory=dict)
    way: Literal["once", "resumed", "longer", "client"] = "once"
    answers: bool = False

    @property
    def has_kills(self) -> bool:
        return "--active-fraction" in self.options

    @property
    def has_server(self) -> bool:
        return self.options.get("--device-blocks") != "all"


FP32: Final = {"--head-dtype": "fp32"}
FP16: Final = {"--head-dtype": "fp16"}
INT8: Final = {"--head-dtype": "int8"}
ON_DEVICE: Final = {**FP32, "--device-blocks": "all", "--block-dtype": "fp32"}
LLAMA_QV: Final = {"--target-modules": QV}
LLAMA_ALL: Final = {"--target-modules": ALL_OF_A_BLOCK}
GPT2: Final = {"--target-modules": "c_attn,c_fc"}
HELD: Final = {**RANDOM, "--kr-on-kill": "hold_forward"}

CASES: Final = (
    Case("llama", "llama", LLAMA_QV, FP32, answers=True),
    Case("llama, kill and revive", "llama", {**LLAMA_QV, **KILL_REVIVE}, FP32),
    Case("llama, kill and revive, resumed", "llama", {**LLAMA_QV, **KILL_REVIVE}, FP32, "resumed"),
    Case("llama, kill and revive, longer", "llama", {**LLAMA_QV, **KILL_REVIVE}, FP32, "longer"),
    Case("llama, all modules", "llama", LLAMA_ALL, FP32),
    Case("llama, all modules, kill and revive by group", "llama", {**LLAMA_ALL, **BY_GROUP}, FP32),
    Case("llama, ffa", "llama", {**LLAMA_QV, **FFA}, FP32),
    Case("llama, ffa, kill and revive, resumed", "llama", {**LLAMA_QV, **FFA, **RANDOM}, FP32, "resumed"),
    Case("llama, bottleneck", "llama", BOTTLENECK, FP32, answers=True),
    Case("llama, bottleneck, its rate found", "llama", {**BOTTLENECK, **FOUND_RATE}, FP32),
    Case("llama, bottleneck of the weights", "llama", {**BOTTLENECK, **OF_WEIGHTS}, FP32),
    Case("llama, bottleneck, kill and revive, resumed", "llama", {**BOTTLENECK, **RANDOM}, FP32, "resumed"),
    Case("llama, trunk", "llama", TRUNK, ON_DEVICE, answers=True),
    Case("llama, trunk, its rate found", "llama", {**TRUNK, **FOUND_RATE}, ON_DEVICE),
    Case("llama, trunk, resumed", "llama", TRUNK, ON_DEVICE, "resumed"),
    Case("llama, trunk, longer", "llama", TRUNK, ON_DEVICE, "longer"),
    Case("llama, local", "llama", LOCAL, ON_DEVICE, answers=True),
    Case("llama, local, resumed", "llama", LOCAL, ON_DEVICE, "resumed"),
    Case("llama, a TrainingClient", "llama", {}, FP32, "client"),
    Case("gpt2", "gpt2", GPT2, FP16),
    Case("gpt2, kill and revive, held", "gpt2", {**GPT2, **HELD}, FP16),
    Case("gpt2, trunk", "gpt2", TRUNK, {**ON_DEVICE, **FP16}),
    Case("gemma2", "gemma2", LLAMA_ALL, INT8),
    Case("gemma2, kill and revive", "gemma2", {**LLAMA_ALL, **KILL_REVIVE, "--kr-score": "grad"}, INT8),
    Case("gemma2, bottleneck", "gemma2", BOTTLENECK, INT8),
)

CLIENT: Final = """
import json, sys
from dlora.edge import Settings, TrainingClient
bundle, server, out, data, steps = sys.argv[1:]
options = dict(kind="lora", rank=4, alpha=8.0, target_modules="q_proj,v_proj", seed=7, wire_dtype="fp32")
options |= dict(lr=0.01, weight_decay=0.01, threads=1, engine="onnx")
with TrainingClient.create(Settings.of(bundle=bundle, server=server, **options)) as client:
    rows = [client.chat_datum(json.loads(line)["messages"]) for line in open(data)]
    for step in range(int(steps)):
        batch = [rows[(8 * step + place) % len(rows)] for place in range(8)]
        loss = client.forward_backward(batch, batch_size=4).loss
        taken = client.optim_step()
        print(json.dumps({"step": step, "loss": loss, "grad_norm": taken.grad_norm}), flush=True)
    after = client.forward(rows[:4])
    print(json.dumps({"loss": after.loss, "logprobs": [each.tolist() for each in after.logprobs]}))
    client.save_adapter(out)
"""
