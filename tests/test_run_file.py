"""``run.json``: what it holds and never holds, going on with nothing but a directory, and runs that are made longer."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest
from processes import Finished, finish, run_edge, start_edge
from runs import settings_in
from safetensors import safe_open
from safetensors.numpy import load_file
from serving import config
from test_cli import assert_fails
from test_resume import KR, SAVE_EVERY, STEPS, Place, assert_same_run, place, rows, wait_for_lines, whole

from dlora.edge.run.run_file import load_run_file
from dlora.edge.seeds import adapter_generator, draw_seed, order_generator, seed_for_server
from dlora.edge.settings import fields_of
from dlora.edge.training.checkpoint import list_checkpoints
from dlora.edge.training.resolved import Resolved, RunIdentity, check_identity, continued
from dlora.protocol.errors import CheckpointError, UsageError

__all__ = ["place", "whole"]  # fixtures

LONGER = STEPS + 24
TOKEN = "dlora_0123abcd_" + "x" * 43


def resume(out: Path, *options: object) -> Finished:
    return run_edge("resume", out, *options, "--json")


def test_run_file_holds_settings_and_no_secrets(place: Place, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    out = tmp_path / "out"
    done = run_edge(*place.train(out, "--token-file", tmp_path / "token", "--steps", 2), DLORA_TOKEN=TOKEN)
    assert done.code == 0, done.stderr
    assert TOKEN not in "".join(path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())
    run = load_run_file(out)
    settings = settings_in(out)
    assert (settings.steps, settings.lr, settings.seed, settings.active_fraction) == (2, 0.01, 0, 1.0)
    assert (settings.data, settings.token_file) == (place.data, tmp_path / "token")
    assert run.data.examples == 10
    assert len(run.data.fingerprint) == 64
    assert set(run.base_model) == {"name", "fingerprint"}
    assert {"dlora", "python", "numpy", "onnxruntime"} <= set(run.versions)


@pytest.mark.parametrize("kr", KR)
def test_resume_needs_only_the_directory(
    place: Place, whole: dict[str, Path], kr: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from another working directory, and where the run was told of its files by relative paths."""
    monkeypatch.chdir(place.data.parent)
    bundle = Path(os.path.relpath(place.bundle, place.data.parent))
    relative = Place(bundle, Path(place.data.name), place.url)
    process = start_edge(*relative.train(tmp_path / "out", *KR[kr]))
    wait_for_lines(tmp_path / "out" / "metrics.jsonl", SAVE_EVERY + 4)
    process.send_signal(signal.SIGKILL)
    finish(process)
    monkeypatch.chdir("/")
    resumed = resume(tmp_path / "out")
    assert resumed.code == 0, resumed.stderr
    assert_same_run(tmp_path / "out", whole[kr])
    again = resume(tmp_path / "out")
    assert again.code == 0
    assert "this run is finished" in again.stderr
    assert json.loads(again.stdout) == json.loads(resumed.stdout)


@pytest.mark.slow
def test_random_seed_is_kept_at_resume(place: Place, tmp_path: Path) -> None:
    """Without --seed two runs differ, and each goes on as itself: its seed lies in its checkpoint, and nowhere else."""
    out, other = tmp_path / "out", tmp_path / "other"
    unseeded = [word for word in place.train(out) if word not in ("--seed", 0)]
    process = start_edge(*unseeded)
    wait_for_lines(out / "metrics.jsonl", SAVE_EVERY + 2)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == 130
    before = rows(out)
    assert resume(out).code == 0
    assert rows(out)[: len(before)] == before
    assert settings_in(out).seed is None
    assert run_edge(*[other if word == out else word for word in unseeded]).code == 0
    assert rows(out) != rows(other)


def test_server_seed_does_not_reveal_the_drawn_seed() -> None:
    drawn = draw_seed()
    assert len(drawn) == 4
    assert drawn != draw_seed()
    assert seed_for_server(drawn) == seed_for_server(drawn) != seed_for_server(draw_seed())
    # What the server is told, or sees, gives neither A nor the order: numpy's generators can be turned back.
    told = seed_for_server((7,))
    assert 0 <= told < 2**32
    generators = [adapter_generator((7,)), *(order_generator((7,), epoch) for epoch in range(20))]
    generators += [adapter_generator((told,)), order_generator((told,), 0)]
    generators += [np.random.default_rng(seed) for seed in (7, told, [7, 0xA], [told, 0xA])]
    assert len({generator.integers(2**63) for generator in generators}) == len(generators)


# -- longer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kr", KR)
def test_a_finished_run_is_made_longer(place: Place, whole: dict[str, Path], kr: str, tmp_path: Path) -> None:
    """From its weights, moments and step counts; schedules, and Kill and Revive, begin anew; metrics go on."""
    out = shutil.copytree(whole[kr], tmp_path / "out")
    done = resume(out, "--steps", LONGER)
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["steps"], summary["first_step"]) == (LONGER, STEPS)
    found = rows(out)
    assert [row["step"] for row in found] == list(range(LONGER))
    assert found[:STEPS] == rows(whole[kr])
    added = found[STEPS:]
    # Linear down to 0 over the added steps, as at the beginning; the warm-up is one step, 3% of 24.
    assert added[0]["learning_rate"] == pytest.approx(0.0)
    assert added[1]["learning_rate"] == pytest.approx(0.01)
    assert added[-1]["learning_rate"] < 0.001
    assert set(added[0]["units"]) == {"1"}, "all units take part again"
    (step, last), *_ = list_checkpoints(out / "checkpoints")
    assert step == LONGER
    with safe_open(last, framework="numpy") as file:
        state = json.loads(file.metadata()["dlora-checkpoint"])["state"]
    assert max(state["adam_steps"]) > STEPS * (kr == "off")
    assert settings_in(out).steps == LONGER


def test_a_longer_run_that_is_killed_goes_on_with_the_same_bits(
    place: Place, whole: dict[str, Path], tmp_path: Path
) -> None:
    undisturbed, out = (shutil.copytree(whole["on"], tmp_path / name) for name in ("undisturbed", "out"))
    assert resume(undisturbed, "--steps", LONGER).code == 0
    process = start_edge("resume", out, "--steps", LONGER)
    wait_for_lines(out / "metrics.jsonl", STEPS + SAVE_EVERY + 1)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert resume(out).code == 0  # run.json knows how long it is by now
    assert rows(out) == rows(undisturbed)
    (_, last), *_ = list_checkpoints(out / "checkpoints")
    (_, wanted), *_ = list_checkpoints(undisturbed / "checkpoints")
    for name, tensor in load_file(wanted).items():
        assert load_file(last)[name].tobytes() == tensor.tobytes(), name


def test_finished_run_is_made_longer_by_epochs(place: Place, whole: dict[str, Path], tmp_path: Path) -> None:
    """10 examples in batches of 3 are 4 steps an epoch."""
    out = shutil.copytree(whole["off"], tmp_path / "out")
    done = resume(out, "--epochs", 12)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 48


def test_run_with_other_settings_cannot_be_made_longer() -> None:
    before = config(total_steps=60)
    longer = config(total_steps=80, seed=())
    out = Path("here")
    assert continued(longer, identity(before), 60, out) == config(total_steps=80, part_begins=60)
    assert continued(config(total_steps=60, seed=()), identity(before), 20, out) == before
    with pytest.raises(UsageError, match=r"at step 20 of 60, and only a finished one .* resume here --steps 60"):
        continued(longer, identity(before), 20, out)
    third = continued(config(total_steps=90, seed=()), identity(config(total_steps=80, part_begins=60)), 80, out)
    assert (third.part_begins, third.steps) == (80, 10)


@pytest.mark.parametrize(("content", "text"), [
    (None, "is no run: it has no run.json"), ("{", "cannot be read"), ("[]", "cannot be read"),
    ("{}", "cannot be read"),
])  # fmt: skip
def test_directory_without_run_is_an_error(content: str | None, text: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    assert_fails(resume(tmp_path), CheckpointError.exit_code, text)


def identity(run: Resolved) -> RunIdentity:
    return RunIdentity(
        settings={"optimizer.lr": run.optimizer.lr}, units=run.units, device_blocks=0, total_steps=run.total_steps,
        part_begins=run.part_begins, seed=run.seed, invocation=(), keeps_outputs=False, base_model="b", head="fp16",
        embedding="fp16", block_dtype="", groups="g", data="d",
    )  # fmt: skip


def test_longer_run_stopped_in_its_last_evaluation_is_not_finished(
    place: Place, whole: dict[str, Path], tmp_path: Path
) -> None:
    """All steps are done and its summary is still that of the shorter run: it is not finished."""
    out = shutil.copytree(whole["off"], tmp_path / "out")
    assert resume(out, "--steps", LONGER).code == 0
    (out / "summary.json").write_bytes((whole["off"] / "summary.json").read_bytes())
    adapter = (out / "adapter_model.safetensors").read_bytes()
    (out / "adapter_model.safetensors").write_bytes((whole["off"] / "adapter_model.safetensors").read_bytes())
    done = resume(out)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == LONGER
    assert "finished" not in done.stderr
    assert (out / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize(("setting", "value"), [
    ("batch_size", 0), ("grad_accum", 0), ("save_every", 0), ("rank", -3), ("seed", -1), ("threads", 10**7),
    ("exchange_timeout_s", 0), ("max_retry_s", -1), ("patience", 0), ("max_length", 0), ("data", "a\0b"),
    ("kill_every", 0), ("lr", "much"), ("token", "dlora_…"),
])  # fmt: skip
def test_invalid_edited_run_file_is_refused(
    whole: dict[str, Path], setting: str, value: object, tmp_path: Path
) -> None:
    """What the command line would not take is not taken here."""
    run = json.loads((whole["off"] / "run.json").read_text())
    sections = {field.key: field.section for field in fields_of()}
    run["settings"][sections.get(setting, "server")][setting] = value
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=setting):
        load_run_file(tmp_path)


def test_the_modules_that_are_trained_are_settings(place: Place, tmp_path: Path) -> None:
    """A run goes on with them; other words for the same modules will do, other modules will not."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    kr = ("--pin", "2", "--active-fraction", "0.5", "--eval", place.data)
    options = ("--target-modules", "o_proj,self_attn.k_proj", "--blocks", "1-2", *kr)
    assert run_edge(*place.train(undisturbed, *options)).code == 0
    process = start_edge(*place.train(out, *options))
    wait_for_lines(out / "metrics.jsonl", SAVE_EVERY + 4)
    process.send_signal(signal.SIGKILL)
    finish(process)
    settings = settings_in(out)
    assert (settings.target_modules, settings.blocks, settings.pin) == ("o_proj,self_attn.k_proj", "1-2", "2")
    assert resume(out).code == 0
    assert rows(out) == rows(undisturbed)
    names = {f"model.layers.{block}.self_attn.{name}" for block in (1, 2) for name in ("k_proj", "o_proj")}
    (_, last), *_ = list_checkpoints(out / "checkpoints")
    assert {key.rpartition(".lora_")[0] for key in load_file(last) if key.endswith(("lora_A", "lora_B"))} == names
    assert "o_proj, self_attn.k_proj" in (out / "README.md").read_text()
    assert all(row["units"][1] == "1" for row in rows(out)), "block 2 is the second unit, and pinned"
    where = ("--bundle", place.bundle, "--server", place.url, "--data", place.data, "--adapter", out)
    evaluated = run_edge("evaluate", *where, "--batch-size", 3, "--json")
    assert evaluated.code == 0, evaluated.stderr
    after = json.loads((out / "summary.json").read_text())["eval_loss_after"]
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(after, rel=1e-6)
    again = ["--target-modules", "k_proj,o_proj", "--blocks", "1,2", *kr, "--resume"]
    assert run_edge(*place.train(out, *again)).code == 0
    for other, said in (
        (["--target-modules", "q_proj", "--blocks", "1-2"], "--target-modules o_proj,self_attn.k_proj, not q_proj. Go"),
        (["--target-modules", "o_proj,self_attn.k_proj", *kr], "--blocks 1-2, not (all). Go"),
        ([*options[:4], "--pin", "1"], "has another --pin. Go"),
        (["--blocks", "1-2"], "--target-modules o_proj,self_attn.k_proj, not q_proj,v_proj. Go"),
    ):
        assert_fails(run_edge(*place.train(out, *kr, *other, "--resume")), CheckpointError.exit_code, said)


def test_a_bundle_with_another_default_is_named() -> None:
    mine = identity(config())
    with pytest.raises(CheckpointError, match=r"has other target modules \(--target-modules, --blocks; or another"):
        check_identity(mine, msgspec.structs.replace(mine, groups="h"))


def test_an_adapter_to_start_from_needs_its_modules_trained(
    place: Place, whole: dict[str, Path], tmp_path: Path
) -> None:
    start = ("--init-adapter", whole["off"], "--steps", 2)
    done = run_edge(*place.train(tmp_path / "out", *start, "--target-modules", "q_proj"))
    assert_fails(done, CheckpointError.exit_code, "v_proj, which has no adapter here")
    assert run_edge(*place.train(tmp_path / "out", *start, "--target-modules", "all-linear")).code == 0
