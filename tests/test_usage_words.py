"""What is wrong with a command line is one line, in our words: not in those of typer, click, pydantic or msgspec."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import Finished, run_cloud, run_edge, run_export

from dlora.edge.commands.app import app as edge_app
from dlora.protocol.command import run_app
from dlora.protocol.errors import UsageError
from dlora.protocol.usage_words import OTHER_NAMES

THEIRS = re.compile(r"Input should|Value error|Invalid value|Usage:|Missing|No such|unexpected|`|\$\.|Expected|╭")


def assert_is_ours(done: Finished, *words: str) -> None:
    assert done.code == UsageError.exit_code
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not THEIRS.search(done.stderr), done.stderr
    for word in words:
        assert word in done.errors[0]


def words_of(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What ``dlora-edge`` says of a command line, in this process."""
    monkeypatch.setattr("sys.argv", ["dlora-edge", *words])
    with pytest.raises(UsageError) as caught:
        run_app(edge_app, "dlora-edge")
    said = str(caught.value)
    assert not THEIRS.search(said), said
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("theirs", "ours"), [
    ("--learning-rate", "--lr"), ("--learning_rate=1e-3", "--lr"), ("--lora-r", "--rank"), ("--max-steps", "--steps"),
    ("--num-epochs", "--epochs"), ("--num-train-epochs", "--epochs"), ("--lora-alpha", "--alpha"),
    ("--per-device-train-batch-size", "--batch-size"), ("--gradient-accumulation-steps", "--grad-accum"),
    ("--output-dir", "--out"), ("--model", "--bundle"), ("--batch_size", "--batch-size"),
])  # fmt: skip
def test_names_of_other_libraries_lead_to_ours(monkeypatch: pytest.MonkeyPatch, theirs: str, ours: str) -> None:
    name = theirs.partition("=")[0]
    assert words_of(monkeypatch, "train", theirs, "1") == f"no option {name}; you mean {ours}"


def test_every_other_name_leads_to_an_option_that_is_there() -> None:
    import typer

    commands = typer.main.get_command(edge_app).commands.values()  # type: ignore[attr-defined]
    ours = {name for command in commands for each in command.params for name in each.opts}
    assert {name.split()[0] for name in OTHER_NAMES} <= ours
    assert not ours & {f"--{other}" for others in OTHER_NAMES.values() for other in others}


@pytest.mark.parametrize(("words", "said"), [
    ("train --steps 0", "--steps 0 is not understood, or out of range; write a whole number from 1 up to"),
    ("train --lr x", "--lr x is not understood, or out of range; write a number"),
    ("train --keep foo", "--keep foo is not understood; write one of: auto, last, best"),
    ("train --steps", "--steps needs a value after it"),
    ("train --keep-cache=3", "--keep-cache takes no value after it"),
    ("train", "--bundle is missing; dlora-edge train --help says more"), ("data", "FILE is missing; dlora-edge data"),
    ("tran", "no command 'tran'; is it 'train'?"), ("train --bundel x", "no option --bundel; is it --bundle?"),
    ("doctor foo bar", "there is nothing to take 'foo bar'"),
])  # fmt: skip
def test_slips_are_one_line(monkeypatch: pytest.MonkeyPatch, words: str, said: str) -> None:
    assert said in words_of(monkeypatch, *words.split())


@pytest.mark.parametrize(("line", "said"), [
    ('lr = "x"', "run.toml: --lr x is not understood"), ("keep-cache = 3", "write true or false"),
    ("learning_rate = 1", "'learning_rate' is no setting; you mean lr"), ("steps = [1]", "a whole number"),
    ("keep = 3", "--keep 3 is not understood, or out of range; write one of"),
])  # fmt: skip
def test_slips_in_a_file_of_settings_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, said: str
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'bundle = "x"\ndata = "y"\nout = "{tmp_path / "out"}"\n{line}\n')
    assert said in words_of(monkeypatch, "train", "--config", str(config))


def test_a_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLORA_EDGE_LR", "x")
    said = words_of(monkeypatch, "train", "--bundle", "x", "--data", "y", "--out", "z")
    assert said.startswith("--lr (from DLORA_EDGE_LR) x is not understood")


def test_the_other_commands_say_it_likewise(tmp_path: Path) -> None:
    """As processes, so that the exit code is seen as well."""
    assert_is_ours(run_edge("train", "--learning-rate", 1), "no option --learning-rate; you mean --lr")
    assert_is_ours(run_export("x", "--out", tmp_path / "out", "--lora-r", 8), "no option --lora-r; you mean --rank")
    assert_is_ours(run_export("--model", "x"), "no option --model; leave that word out")
    assert_is_ours(run_cloud("serve", "x", "--port", 99999), "--port 99999 is not understood, or out of range")
