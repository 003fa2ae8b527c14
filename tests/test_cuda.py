"""What a server computes on a GPU is what it computes on the processor. Run by ``make test-gpu``, where there is one.

Nothing here says that CUDA works: it says what is tried where somebody has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, tiny_model
from processes import cloud_process, run_edge
from serving import config, random_dataset, serving, training
from test_low_bits import in_dtype, outputs_and_gradient
from test_placement import RUNS, answers
from test_tensor_parallel import difference
from tiny import TinyFactory

from dlora.cloud.model.base_model import load_base_model
from dlora.cloud.model.low_bits import hold_in_low_bits
from dlora.cloud.model.workers import Workers
from dlora.protocol.choices import WeightFormat

DEVICE = "cuda"
GPUS = torch.cuda.device_count()
TOLERANCE = 1e-4  # sums are in another order

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason=f"torch {torch.__version__} sees no CUDA device here: nothing was tried"),
]
needs_two = pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA devices, and torch sees {GPUS}")
FAMILIES = ["llama", "phi3", "opt", "stablelm", "qwen3_moe", "gemma2", "gpt2"]


@pytest.fixture(autouse=True)
def _whole_float32() -> Iterator[None]:
    """Without TensorFloat-32, which rounds what is multiplied to ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weight_format", ["full", "int8", "nf4"])
def test_blocks_compute_what_they_do_on_the_processor(family: str, weight_format: WeightFormat) -> None:
    if family == "gpt2" and weight_format != "full":
        pytest.skip("has no linear modules of the ordinary kind")
    found = []
    for device in (DEVICE, "cpu"):
        model = in_dtype(tiny_model(family), torch.float32)
        hold_in_low_bits(model, weight_format)
        model.to(device)  # type: ignore[arg-type]  # its decorator loses self
        found.append(outputs_and_gradient(model))
    for ours, wanted in zip(*found, strict=True):
        assert difference(ours.cpu(), wanted) < TOLERANCE


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_runs_have_the_same_losses(run: str, family: str, tiny: TinyFactory) -> None:
    """Live, with Kill and Revive, in passes, with bases of data and of weights."""
    changes, dataset = RUNS[run]
    bundle = tiny(family, head_dtype="fp32").bundle
    found = []
    for device in (DEVICE, "cpu"):
        base = load_base_model(str(tiny(family).model), device=device)
        settings = config(total_steps=3, **changes)
        with serving(base) as server, training(bundle, server.url, settings, dataset) as trainer:
            found.append([*(trainer.run_step().loss for _ in range(3)), trainer.evaluate(dataset).loss])
    assert found[0] == pytest.approx(found[1], rel=TOLERANCE)


def test_answers_are_the_same_wherever_the_blocks_are(tiny: TinyFactory) -> None:
    """On one GPU, and as accelerate spreads them over all."""
    bundle, model = tiny(head_dtype="fp32").bundle, str(tiny().model)
    wanted = answers(tiny().base, bundle)
    assert answers(load_base_model(model, device=DEVICE), bundle) == wanted
    assert answers(load_base_model(model, device_map="auto"), bundle) == wanted


@needs_two
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_two_gpus_hold_half_of_the_weights_each(family: str, tiny: TinyFactory) -> None:
    workers = Workers(2, device=DEVICE)
    try:
        bundle, dataset = tiny(family, head_dtype="fp32").bundle, random_dataset(VOCABULARY)
        found = []
        for base in (
            load_base_model(str(tiny(family).model), device=DEVICE),
            load_base_model(str(tiny(family).model), device=DEVICE, workers=workers),
        ):
            with serving(base) as server, training(bundle, server.url, config(total_steps=3), dataset) as trainer:
                found.append([trainer.run_step().loss for _ in range(3)])
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    finally:
        workers.close()


@pytest.mark.parametrize("options", [(), ("--dtype", "auto"), ("--weights", "int8"), ("--device-map", "auto")])
def test_command_serves_from_a_gpu(options: tuple[str, ...], tiny: TinyFactory, tmp_path: Path) -> None:
    weights: WeightFormat = "int8" if "int8" in options else "full"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"w{row} w5 w7 w9 w11"}) + "\n" for row in range(8)))
    where = () if "--device-map" in options else ("--device", DEVICE)
    with cloud_process(tiny().model, tmp_path, *where, *options) as cloud:
        assert str(cloud.hello["device"]).startswith(DEVICE)
        done = run_edge(
            "train", "--bundle", tiny(weight_format=weights).bundle, "--server", cloud.url, "--data", data,
            "--out", tmp_path / "out", "--steps", 3, "--hold-out", 0,
        )  # fmt: skip
    assert done.code == 0, done.stderr
