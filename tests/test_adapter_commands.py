"""``dlora-edge adapters``, by real processes; and the how-to's commands, as they stand there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import metadata_load
from processes import BIN, Finished, quiet_environment, run_command, run_edge
from serving import serving
from test_adapter_store import damage
from test_cli import Place, assert_fails
from tiny import Tiny, TinyFactory

from dlora.edge.adapters.peft import load_adapter
from dlora.protocol.adapter_record import RECORD_NAME, WEIGHTS_NAME, load_record
from dlora.protocol.errors import BundleError, CheckpointError, ModelMismatchError, UsageError

ROOT = Path(__file__).parents[1]
HOW_TO = (ROOT / "docs/how-to/adapters.md").read_text()
HELD_OUT = ("--eval-every", 1, "--keep", "best")


@pytest.fixture(scope="module")
def model(tiny: TinyFactory) -> Tiny:
    return tiny()


@pytest.fixture(scope="module")
def place(model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"w{rng.integers(80)} w88", "completion": f" w{rng.integers(80)} w5"} for _ in range(8)]
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


@pytest.fixture(scope="module")
def run(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory: of LoRA, which is trained everywhere, with held-out data."""
    out = tmp_path_factory.mktemp("run") / "my-adapter"
    done = run_edge(*place.train(out, steps=3), "--eval", place.data, *HELD_OUT)
    assert done.code == 0, done.stderr
    return out


@pytest.fixture
def store(run: Path, tmp_path: Path) -> Path:
    """A directory with the run's adapter as ``good``, and two that cannot be used."""
    directory = tmp_path / "store"
    for name in ("good", "bad"):
        shutil.copytree(run, directory / name)
    damage(directory / "bad" / WEIGHTS_NAME)
    (directory / "not one").mkdir()
    return directory


def adapters(*words: object, store: Path | None = None) -> Finished:
    return run_edge("adapters", *words, *(("--adapters", store) if store is not None else ()))


def test_run_saves_what_it_learnt_with_the_adapter(place: Place, model: Tiny, run: Path) -> None:
    record, found = load_record(run), json.loads((run / "summary.json").read_text())
    assert record is not None
    training = record.training
    assert training is not None
    assert record.base_fingerprint == model.base.fingerprint
    assert (training.steps, training.examples) == (found["best_step"], 8)
    assert (training.eval_loss_before, training.eval_loss_after) == (found["eval_loss_before"], found["eval_loss_best"])
    both = found["bytes_up"] + found["bytes_down"]
    assert training.bytes_per_token == pytest.approx(both / found["tokens"], abs=0.1)
    assert training.recipe["kind"] == "lora"
    assert {"numpy", "onnxruntime", "python"} <= set(training.versions)
    best = load_record(run / "best")
    assert best is not None
    assert best.training is not None
    assert best.training.eval_loss_after == found["eval_loss_best"]
    assert metadata_load(run / "README.md")["pipeline_tag"] == "text-generation"


def test_saved_adapter_tells_nobody_where_it_was_trained(place: Place, run: Path) -> None:
    """It may be given away: neither seed, server, path nor the data's digest stands in it."""
    digest = json.loads((run / "run.json").read_text())["data"]["fingerprint"]
    for name in (RECORD_NAME, "README.md"):
        text = (run / name).read_text()
        for private in (str(place.data), place.url, digest, "seed", str(run)):
            assert private not in text, private


def test_list_names_what_cannot_be_used_and_ends_well(store: Path, model: Tiny) -> None:
    done = adapters("list", store=store)
    assert (done.code, done.stderr) == (0, "")
    table = done.stdout.splitlines()
    assert re.match(r" *good +lora +4 +4 +everything", table[1]), done.stdout
    assert [line.split(" cannot be used: ")[0] for line in table if "cannot be used" in line] == ["bad", "not one"]
    listed = json.loads(adapters("list", "--json", "--bundle", model.bundle, store=store).stdout)
    assert listed["directory"] == str(store)
    bad, good, other = listed["adapters"]
    assert ("SHA-256" in bad["error"], "cannot be the name" in other["error"]) == (True, True)
    assert (good["fits"], good["kind"], good["base_fingerprint"]) == (True, "lora", model.base.fingerprint)


def test_list_with_a_bundle_says_what_does_not_fit(store: Path, tiny: TinyFactory) -> None:
    other = tiny(seed=1).bundle  # the same shapes
    done = adapters("list", "--bundle", other, store=store)
    assert done.code == 0
    assert "good does not fit: the adapter was trained on" in done.stdout
    (store / "good" / RECORD_NAME).unlink()
    listed = json.loads(adapters("list", "--bundle", other, "--json", store=store).stdout)["adapters"]
    assert [each["fits"] for each in listed if each["name"] == "good"] == [True], "nobody can know better"
    assert re.search(r"good .* likely", adapters("list", "--bundle", other, store=store).stdout)
    done = adapters("list", "--bundle", store, store=store)
    assert_fails(done, BundleError.exit_code, "manifest.json")


def test_empty_directory_is_said_to_be_empty(tmp_path: Path) -> None:
    done = adapters("list", store=tmp_path / "none")
    assert (done.code, "there are no adapters in" in done.stdout) == (0, True)
    assert json.loads(adapters("list", "--json", store=tmp_path / "none").stdout)["adapters"] == []
    assert not (tmp_path / "none").exists()


def test_show_takes_a_name_or_a_path(store: Path, run: Path, model: Tiny) -> None:
    done = adapters("show", "good", store=store)
    assert done.code == 0, done.stderr
    before = json.loads((run / "summary.json").read_text())["eval_loss_before"]
    for said in (f"{before:.4f} before", "bytes a token", "--kind lora", "everything"):
        assert said in " ".join(done.stdout.split()), said
    by_name, by_path = (json.loads(adapters("show", each, "--json", store=store).stdout) for each in ("good", run))
    assert by_path == {**by_name, "name": run.name}
    assert by_name["base_fingerprint"] == model.base.fingerprint
    assert_fails(adapters("show", "bad", store=store), CheckpointError.exit_code, "SHA-256")
    assert_fails(adapters("show", "nobody", store=store), UsageError.exit_code, "there is no adapter nobody")


def test_adapter_of_another_base_model_is_refused_before_it_is_used(
    place: Place, run: Path, tiny: TinyFactory, tmp_path: Path
) -> None:
    """The same shapes and other weights, so that nothing else would tell."""
    where = ("--bundle", tiny(seed=1).bundle, "--server", place.url, "--adapter", run)
    for command in (
        ["generate", *where, "--prompt", "w1"],
        ["evaluate", *where, "--data", place.data],
        place.train(tmp_path / "out", bundle=tiny(seed=1).bundle, init_adapter=run),
    ):
        assert_fails(run_edge(*command), ModelMismatchError.exit_code, "the adapter was trained on")
    done = run_edge(*place.train(tmp_path / "yes", init_adapter=run))
    assert done.code == 0, done.stderr


@pytest.mark.slow
def test_commands_of_the_how_to_do_what_it_says(place: Place, model: Tiny, run: Path, tmp_path: Path) -> None:
    """Line by line, in a directory that has what they name."""
    build = tmp_path / "build"
    build.mkdir()
    (build / "smollm2").symlink_to(model.bundle)
    shutil.copytree(run, tmp_path / "my-adapter")
    environment = quiet_environment()
    environment |= {"HOME": str(tmp_path), "PATH": f"{BIN}:{environment['PATH']}"}
    environment.pop("XDG_DATA_HOME", None)
    blocks = re.findall(r"^```sh\n(.*?)^```", HOW_TO, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(lines) >= 6
    for line in lines:
        line = line.replace("ws://127.0.0.1:8765", place.url).replace("smollm2-135m", str(model.model))
        done = run_command(["bash", "-c", line], cwd=tmp_path, env=environment)
        assert done.code == 0, (line, done.stderr)
    assert load_adapter(tmp_path / ".local/share/dlora/adapters/support").record is not None
