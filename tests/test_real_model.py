"""The equalities on the real SmolLM2-135M. Slow: ``make test-slow``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft_reference as reference
import pytest
import torch
from generating import generated
from peft import PeftModel
from processes import CloudProcess, cloud_process, run_edge
from serving import config, open_model, serving, training
from test_peft_adapter import random_modules
from transformers import AutoModelForCausalLM

from dlora.cloud.model.base_model import find_source, load_base_model, load_model
from dlora.edge.adapters.peft import save_adapter
from dlora.edge.data.reading import load_examples
from dlora.edge.data.tokenizer import EdgeTokenizer
from dlora.edge.engine.bundle import Bundle
from dlora.edge.engine.engine import Array
from dlora.edge.run.footprint import training_mb
from dlora.export.merge import merge_adapter
from dlora.export.settings import MergeSettings
from dlora.protocol.choices import KindChoice
from dlora.protocol.manifest import load_manifest

ROOT = Path(__file__).parents[1]
FP32, FP16, INT8 = (ROOT / "build" / name for name in ("smollm2-fp32", "smollm2", "smollm2-int8"))
MODEL = "smollm2-135m"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Real dialogue, as the demo has it."""
    directory = tmp_path_factory.mktemp("data")
    code = "import pathlib, sys, dialogue; dialogue.write_dialogue(pathlib.Path(sys.argv[1]), 12, 0)"
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True, cwd=ROOT / "examples")
    return directory / "train.jsonl", directory / "eval.jsonl"


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudProcess]:
    with cloud_process(smollm2, tmp_path_factory.mktemp("server"), "--threads", 2) as running:
        yield running


def test_twelve_steps_equal_peft(data: tuple[Path, Path], server: CloudProcess, smollm2: Path) -> None:
    """Same initial adapter, order and settings, fp32 wire and head, all active: the losses and the final adapters."""
    bundle = Bundle.open(FP32)
    tokenizer = EdgeTokenizer.open(bundle)
    dataset = load_examples(data[0], tokenizer, max_length=48, too_long="skip")
    adamw = {"lr": 1e-3, "weight_decay": 0.01}
    run = config(total_steps=12, batch_size=4, rank=8, lora_alpha=16.0, optimizer=adamw)
    with training(FP32, server.url, run, dataset) as trainer:
        scale = run.adapter.rank, run.adapter.alpha
        start = reference.with_adapters(load_base_model(str(smollm2)).model, trainer.adapters, *scale)
        losses = [trainer.run_step().loss for _ in range(run.total_steps)]
    torch.set_num_threads(1)
    parameters = [parameter for parameter in start.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **adamw)
    for step, found in enumerate(losses):
        optimizer.zero_grad()
        loss = reference.loss_of(start, trainer.batches.step_batches(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert found == pytest.approx(loss.item(), rel=1e-4), f"step {step}"
    difference = norm = 0.0
    for name, parameter in trainer.adapters.parameters().items():
        wanted = reference.parameter(start, name).detach().numpy()
        difference += float(np.square(parameter.value - wanted).sum())
        norm += float(np.square(wanted).sum())
    assert (difference / norm) ** 0.5 < 1e-3


def test_a_divided_and_a_placed_model_train_as_a_whole_one(
    data: tuple[Path, Path], smollm2: Path, tmp_path: Path
) -> None:
    """Weights divided between two processes: losses and adapters to 1e-5. Every third block on disk: no other bit."""
    dataset = load_examples(data[0], EdgeTokenizer.open(Bundle.open(FP32)), max_length=48, too_long="skip")
    run = config(
        total_steps=3, batch_size=2, rank=8, target_modules=("all-linear",), kind="bottleneck",
        passes="2,2", kill_revive={"active_fraction": 0.25, "warmup_steps": 1, "kill_every": 1},
        # By default AdamW makes steps of one size of gradients that are nothing but rounding.
        optimizer={"lr": 1e-2, "eps": 1e-3},
    )  # fmt: skip

    def trained(url: str) -> tuple[Array, Array]:
        with training(FP32, url, run, dataset) as trainer:
            losses = np.array([trainer.run_step().loss for _ in range(run.total_steps)])
            values = [each.value.ravel() for each in trainer.adapters.parameters().values()]
            return losses, np.concatenate(values)

    with serving(load_base_model(str(smollm2))) as plain:
        whole = trained(plain.url)
    ends = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    blocks = {f"model.layers.{block}": "cpu" if block % 3 else "disk" for block in range(30)}
    with serving(load_base_model(str(smollm2), device_map={**ends, **blocks})) as placed:
        on_disk = trained(placed.url)
    with cloud_process(smollm2, tmp_path, "--tensor-parallel", 2) as divided:
        apart = trained(divided.url)
    for wanted, same, near in zip(whole, on_disk, apart, strict=True):
        assert np.array_equal(same, wanted)
        assert 0 < np.linalg.norm(near - wanted) <= 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("bundle", "wire_dtype", "tolerance", "active_fraction"),
    [(FP32, "fp32", 1e-4, 0.125), (FP16, "fp16", 2e-3, 1.0)],
    ids=["fp32", "fp16"],
)
def test_saved_adapter_gives_the_same_loss_in_peft(
    bundle: Path, wire_dtype: str, tolerance: float, active_fraction: float, data: tuple[Path, Path],
    server: CloudProcess, smollm2: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """PEFT gives the device's evaluation loss, with kill-and-revive on and off."""
    need(bundle)
    done = run_edge(
        "train", "--kind", "lora", "--bundle", bundle, "--server", server.url, "--data", data[0], "--eval", data[1],
        "--out", tmp_path, "--steps", 5, "--batch-size", 4, "--lr", 2e-3, "--wire-dtype", wire_dtype, "--kr-score",
        "grad", "--set", "kill_revive.warmup_steps=3", "--active-fraction", active_fraction, "--seed", 0, "--json",
        timeout_s=900,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    arguments = [str(smollm2), str(tmp_path), str(bundle), str(data[1])]
    check = subprocess.run(
        [sys.executable, ROOT / "examples" / "peft_check.py", *arguments], check=True, capture_output=True, text=True
    )
    assert json.loads(check.stdout)["loss"] == pytest.approx(summary["eval_loss_after"], abs=tolerance)


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
@pytest.mark.parametrize(("bundle", "limit_mb"), [(FP16, 215), (INT8, 185)])
def test_estimated_memory_of_training_is_small(bundle: Path, kind: KindChoice, limit_mb: int) -> None:
    """Of 256 tokens a step, every one of them labelled; what it takes is measured by benchmarks/device.py."""
    need(bundle)
    assert training_mb(load_manifest(bundle), kind=kind) <= limit_mb


def need(bundle: Path) -> None:
    assert (bundle / "manifest.json").exists(), f"no bundle in {bundle}; run: make test-slow"


def test_a_gguf_file_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    class Counted(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            read.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    load_model(find_source("smollm2-135m"))
    assert len(read) == 1
    assert gguf.GGUFReader is Counted


def test_merged_model_of_a_gguf_file_equals_peft(tmp_path: Path) -> None:
    """transformers would not save what it calls quantised, though its weights are floats by then."""
    need(FP16)
    modules = random_modules({f"model.layers.{block}.self_attn.q_proj": (576, 576) for block in (3, 29)}, r=4)
    fingerprint = load_manifest(FP16).base_model.fingerprint
    save_adapter(
        tmp_path / "adapter", modules, r=4, lora_alpha=0.1, base_model_name=MODEL, base_fingerprint=fingerprint
    )
    assert merge_adapter(MergeSettings(MODEL, tmp_path / "adapter", tmp_path / "merged")).is_checked
    ids = torch.arange(100, 140)[None]
    merged, base = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), load_model(find_source(MODEL))
    with torch.no_grad():
        found, alone = merged(ids).logits, base(ids).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")(ids).logits
    assert (theirs - alone).abs().max() > 0.1
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-3)


def test_answers_are_those_of_peft(
    data: tuple[Path, Path], server: CloudProcess, smollm2: Path, tmp_path: Path
) -> None:
    """Of the default recipe's adapter, fp32 throughout: token by token PEFT's ``generate``, with drafts and without."""
    need(FP32)
    done = run_edge(
        "train", "--bundle", FP32, "--server", server.url, "--data", data[0], "--out", tmp_path, "--steps", 6,
        "--batch-size", 4, "--seed", 0, timeout_s=900,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    bundle = Bundle.open(FP32)
    tokenizer = EdgeTokenizer.open(bundle)
    model = PeftModel.from_pretrained(load_base_model(str(smollm2)).model, tmp_path).eval()
    with open_model(bundle, server.url, tmp_path, wire_dtype="fp32", context_length=256) as opened:
        for question in ("What do you like to read?", "Say the same word five times."):
            ids = tokenizer.encode_chat([{"role": "user", "content": question}]).tolist()
            with torch.no_grad():
                found = model.generate(
                    input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
                )
            wanted = found[0, len(ids) :].tolist()
            for draft_length in (0, 4):
                assert generated(opened, ids, 12, draft_length=draft_length) == wanted
