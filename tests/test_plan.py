"""What a run says before it starts, and that it comes true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from processes import run_edge
from runs import settings_in
from serving import config, serving
from test_cli import Place, assert_fails
from tiny import TinyFactory

from dlora.edge.data.examples import Dataset
from dlora.edge.training.expected import expected_mb
from dlora.protocol.adapter_record import RECORD_NAME
from dlora.protocol.errors import CheckpointError, ModelMismatchError, UsageError
from dlora.protocol.kill_revive import MAX_UNITS
from dlora.protocol.limits import MAX_STEPS
from dlora.protocol.manifest import load_manifest

BLOCKS = 8
LONGEST = 64  # of the tiny model


@pytest.fixture(scope="module")
def place(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("plan")
    model = tiny(blocks=BLOCKS)
    data = directory / "data.jsonl"
    rows = [{"prompt": "w1 w2 " * (n % 3 + 1), "completion": " w3 w4 w5"} for n in range(9)]
    rows.insert(2, {"prompt": "w1", "completion": " w2" * 40})  # cut
    rows.insert(4, {"prompt": "w1 " * 40, "completion": " w2"})  # nothing of the answer is left
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


def test_plan_has_data_and_run_lines(place: Place, tmp_path: Path) -> None:
    done = run_edge(
        *place.train(tmp_path / "out", max_length=20, too_long="truncate", steps=None, epochs=3, batch_size=3), "--json"
    )
    assert done.code == 0, done.stderr
    data, run, *_ = done.stderr.splitlines()
    name = place.data
    assert data.startswith("data: data.jsonl (prompt and completion), 10 examples, ")
    assert data.endswith(f"; 1 truncated ({name}:3); 1 skipped ({name}:5)")
    assert run.startswith("run: 12 steps, 4 an epoch, 3.0 epochs; all 8 blocks active; about ")
    summary = json.loads(done.stdout)
    assert "expected time: 0:0" in done.stderr
    assert re.search(r"expected time: 0:\d\d for 9 steps", done.stderr)
    assert f"{summary['tokens'] // 3:,} tokens" in data
    assert f"{summary['labelled'] // 3:,} labelled" in data


@pytest.mark.parametrize(("options", "tolerance"), [
    ({"lr": 0.01}, 0.05),
    ({"active_fraction": 0.25, "lr": 0.01}, 0.05),
    pytest.param(
        {"active_fraction": 0.25, "kr_score": "grad", "steps": 120, "lr": 0.01}, 0.25,  # units that fade come on top
        marks=pytest.mark.slow,
    ),
    ({"kr_score": "static", "static_units": "1,5", "lr": 0.01}, 0.05),
    ({"passes": "2,2", "wire_dtype": "int8", "steps": 60, "lr": 0.01}, 0.03),  # with what is kept
], ids=str)  # fmt: skip
def test_expected_traffic_is_near_the_counted(
    place: Place, tmp_path: Path, options: dict[str, object], tolerance: float
) -> None:
    done = run_edge(
        *place.train(tmp_path / "out", max_length=20, too_long="truncate", batch_size=5, **{"steps": 10, **options}),
        "--json",
    )
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    (expected,) = re.findall(r"about ([\d,.]+) MB for training will cross", done.stderr)
    counted = (summary["bytes_up"] + summary["bytes_down"]) / 1e6
    assert float(expected.replace(",", "")) == pytest.approx(counted, rel=tolerance)


def test_as_many_units_are_active_as_a_tokens_bytes_allow(place: Place, tmp_path: Path) -> None:
    cut = {"max_length": 20, "too_long": "truncate", "batch_size": 5, "lr": 0.01}

    def run(name: str, **options: object) -> tuple[float, float]:
        """Counted bytes a token, and the share of units that was active."""
        done = run_edge(*place.train(tmp_path / name, steps=10, **cut, **options), "--json")
        assert done.code == 0, done.stderr
        summary = json.loads(done.stdout)
        spent = (summary["bytes_up"] + summary["bytes_down"]) / summary["tokens"]
        return spent, settings_in(tmp_path / name).active_fraction

    spent, _ = run("three", active_fraction=3 / 8)
    assert run("enough", bytes_per_token=round(1.03 * spent))[1] == 3 / 8
    below, fraction = run("less", bytes_per_token=round(0.9 * spent))
    assert fraction == 2 / 8
    assert below < spent
    assert run("much", bytes_per_token=10**6)[1] == 1
    done = run_edge(*place.train(tmp_path / "little", bytes_per_token=9, **cut))
    assert (done.code, len(done.stderr.splitlines())) == (2, 2), done.stderr
    assert re.search(r"--bytes-per-token 9 is too little: one block of the 8 costs [\d,]+ on these data", done.stderr)


@pytest.mark.parametrize(("options", "said"), [
    ({}, []),
    ({"active_fraction": 0.25, "kr_score": "grad", "steps": 2}, [
        "2 of 8 blocks active: that saves traffic and costs quality",
        "warning: 2 steps are too few for warm-up, ramp and trials; use 107 steps or more, or --active-fraction 1",
    ]),
    ({"static_units": "1,2", "steps": 2}, ["2 of 8 blocks active: that saves traffic and costs quality"]),
    ({"static_units": "1,2", "kr_on_kill": "give_to_server", "steps": 2}, [
        "2 of 8 blocks active: that saves traffic and costs quality",
        "the server is given what killed blocks have learnt, and applies it (SECURITY.md)",
    ]),
], ids=["all active", "a fraction", "static", "given"])  # fmt: skip
def test_note_on_active_fraction_is_shown(
    place: Place, tmp_path: Path, options: dict[str, object], said: list[str]
) -> None:
    done = run_edge(*place.train(tmp_path / "out", max_length=20, too_long="skip", **options))
    assert done.code == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if re.search("costs quality|too few|is given", line)] == said


@pytest.mark.parametrize(("options", "words"), [
    ({"pin": "8"}, "--pin: block 8 is not trained; blocks 0-7 are"),
    ({"pin": "8", "kr_unit": "group"}, "--pin: there is no group 8; they are 0 to 7"),
    ({"pin": "1", "blocks": "4-7"}, "--pin: block 1 is not trained; blocks 4-7 are"),
    ({"blocks": "8"}, "--blocks: the bundle has nothing to train in block 8; blocks are 0-7"),
    ({"blocks": "x"}, "--blocks 'x': write blocks as 0,3,26-29"),
    ({"blocks": "9" * 5000}, "write blocks as 0,3,26-29"),
    ({"blocks": str(MAX_UNITS)}, "write blocks as 0,3,26-29"),
    ({"blocks": ","}, "--blocks ',': write blocks as"),
    ({"target_modules": "nope,q_proj"}, "no module 'nope' that can be trained; --target-modules can be: "
     "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, all-linear"),
    ({"target_modules": "all-linear,q_proj"}, "no module 'all-linear'"),
    ({"target_modules": " , "}, "--target-modules is empty"),
    ({"target_modules": "model.layers.0.self_attn.q_proj", "blocks": "1,2"}, "in the blocks 1-2; --target-modules"),
    ({"pin": "x"}, "--pin 'x': write units as 0,3,26-29"),
    ({"static_units": "0-8", "kr_score": "static"}, "--static-units: block 8 is not trained"),
    ({"static_units": "1", "kr_score": "random"}, "--static-units needs --kr-score static"),
    ({"kr_score": "static", "active_fraction": 0}, "no unit would be trained: name some with --static-units"),
    ({"active_fraction": 0, "kr_score": "grad"}, "--active-fraction 0 would train nothing"),
    ({"bytes_per_token": 9, "active_fraction": 0.5}, "--bytes-per-token chooses how many units are active"),
    ({"max_length": LONGEST + 1}, f"--max-length {LONGEST + 1} is over the {LONGEST} tokens"),
])  # fmt: skip
def test_invalid_settings_are_refused_before_data_and_server(
    place: Place, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    nowhere = {"server": "ws://127.0.0.1:1", "data": tmp_path / "none.jsonl"}
    assert_fails(run_edge(*place.train(tmp_path / "out", **nowhere, **options)), UsageError.exit_code, words)
    assert not (tmp_path / "out").exists()


def test_empty_run_directory_is_removed(place: Place, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for out in (tmp_path / "deep" / "out", tmp_path / "mine"):
        done = run_edge(*place.train(out, server="ws://127.0.0.1:1", max_length=20, too_long="skip"))
        assert done.code == 6, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_adapter_of_another_base_model_is_named_as_such(place: Place, tiny: TinyFactory, tmp_path: Path) -> None:
    cut = {"max_length": 20, "too_long": "skip"}
    wide = tiny(blocks=BLOCKS, hidden_size=32)
    with serving(wide.base) as server:
        assert run_edge(*Place(wide.bundle, place.data, server.url).train(tmp_path / "theirs", **cut)).code == 0
    from_theirs = place.train(tmp_path / "out", init_adapter=tmp_path / "theirs", **cut)
    said = ("the adapter was trained on", "take an adapter of that base model")
    assert_fails(run_edge(*from_theirs), ModelMismatchError.exit_code, *said)
    (tmp_path / "theirs" / RECORD_NAME).unlink()  # as PEFT saves: no fingerprint
    said = ("is of another base model", "numbers, the bundle's from")
    assert_fails(run_edge(*from_theirs), CheckpointError.exit_code, *said)
    assert run_edge(*place.train(tmp_path / "mine", **cut)).code == 0
    done = run_edge(*place.train(tmp_path / "out", init_adapter=tmp_path / "mine", rank=2, **cut))
    assert_fails(done, CheckpointError.exit_code, "has rank 4; train with --rank 4")


def test_a_run_of_a_billion_steps_is_planned_at_once(place: Place) -> None:
    """What it expects is a sample then; this test would take minutes otherwise."""
    run = config(total_steps=MAX_STEPS, batch_size=2, wire_dtype="fp16", kill_revive={"active_fraction": 0.25})
    dataset, manifest = Dataset.of([([1, 2, 3], [0, 1])] * 4), load_manifest(place.bundle)
    whole = expected_mb(run, manifest, dataset, 0)
    shorter = expected_mb(msgspec.structs.replace(run, total_steps=1000), manifest, dataset, 0)
    assert whole == pytest.approx(shorter * 1e6, rel=0.03)


@pytest.mark.parametrize(
    "options", [{}, {"active_fraction": 0.25, "kr_score": "grad", "set": "kill_revive.warmup_steps=4"}], ids=str
)
def test_expected_traffic_includes_evaluations(place: Place, tmp_path: Path, options: dict[str, object]) -> None:
    """Before a run all units take part, and after it those that stay active: once it was counted as if few did."""
    held_out = tmp_path / "held.jsonl"
    held_out.write_text((json.dumps({"text": "w1 w2 w3 w4 " * 4}) + "\n") * 32)
    done = run_edge(
        *place.train(
            tmp_path / "out", eval=held_out, max_length=20, too_long="skip", steps=24, batch_size=8, eval_every=12,
            **options,
        ),
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    summary = json.loads(done.stdout)
    (expected, count) = re.findall(r"and ([\d,.]+) MB for (\d+) evaluations", done.stderr)[0]
    assert int(count) == len(summary["evaluations"]) == 3
    counted = (summary["eval_bytes_up"] + summary["eval_bytes_down"]) / 1e6
    assert float(expected.replace(",", "")) == pytest.approx(counted, rel=0.1, abs=0.05)
