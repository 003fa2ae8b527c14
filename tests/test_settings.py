"""Settings of a run: each is one field, and everything that has to do with it follows from that."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Finished, run_edge
from serving import serving
from test_cli import Place, assert_fails, place  # noqa: F401
from tiny import TinyFactory

from dlora.edge.client.training_client import TrainingClient
from dlora.edge.commands.settings_options import load_config
from dlora.edge.settings import Settings, fields_of

ROOT = Path(__file__).resolve().parents[1]
USAGE = 2
NEEDED = 'bundle = "b"\ndata = "d.jsonl"\nout = "o"\n'


def train(directory: Path, text: str, *options: object, **environment: str) -> Finished:
    (directory / "run.toml").write_text(text)
    return run_edge("train", "--config", directory / "run.toml", *options, **environment)


def resolved(directory: Path, text: str, *options: object, **environment: str) -> dict[str, Any]:
    """What each setting that is no default came to, by section."""
    written = directory / "written.toml"
    written.unlink(missing_ok=True)
    done = train(directory, text, *options, "--write-config", written, **environment)
    assert done.code == 0, done.stderr
    return {name: values for name, values in tomllib.loads(written.read_text()).items() if values}


def test_the_nearest_word_counts(tmp_path: Path) -> None:
    """The file by sections or by the names of options, the environment, --set, an option."""
    here = str(Path.cwd())
    text = NEEDED + "lr = 1e-3\nrank = 8\n[training]\nbatch_size = 2\n[placement]\nkeep-cache = true\n"
    assert resolved(tmp_path, text) == {
        "device": {"bundle": f"{here}/b"}, "data": {"data": f"{here}/d.jsonl"}, "saving": {"out": f"{here}/o"},
        "optimizer": {"lr": 1e-3}, "adapter": {"rank": 8}, "training": {"batch_size": 2},
        "placement": {"keep_cache": True},
    }  # fmt: skip
    variables = {"LR": "2e-3", "RANK": "4", "EPOCHS": "2", "OPTIMIZER_BETA1": "0.8", "ALPHA": "3"}
    of_all = resolved(
        tmp_path, text, "--lr", 3e-3, "--set", "adapter.alpha=5", **{f"DLORA_EDGE_{k}": v for k, v in variables.items()}
    )
    assert of_all["optimizer"] == {"lr": 3e-3, "beta1": 0.8}
    assert of_all["training"] == {"batch_size": 2, "epochs": 2.0}
    assert of_all["adapter"]["rank"] == 4


def test_a_run_says_what_the_environment_says(tmp_path: Path) -> None:
    done = train(tmp_path, NEEDED, "--rank", 2, DLORA_EDGE_RANK="4", DLORA_EDGE_LR="2e-3", DLORA_EDGE_OPTIMIZER_EPS="1")
    assert "from the environment: DLORA_EDGE_OPTIMIZER_EPS, DLORA_EDGE_LR\n" in done.stderr


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    text = NEEDED + (
        'pause-when = ["battery<20", "temp>70"]\ncolumns = "text=a \\"b\\" é"\neval = "e"\nkeep-cache = true\n'
        "seed = 0\n"
    )
    first = resolved(tmp_path, text)
    assert first["device"]["pause_when"] == ["battery<20", "temp>70"]
    assert first["data"]["columns"] == 'text=a "b" é'
    assert resolved(tmp_path, (tmp_path / "written.toml").read_text()) == first


def test_a_written_file_names_every_setting(tmp_path: Path) -> None:
    resolved(tmp_path, NEEDED)
    section, named = "", set()
    for line in (tmp_path / "written.toml").read_text().splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            section = found[1]
        elif found := re.match(r"(?:# )?(\w+) =", line):
            named.add(f"{section}.{found[1]}")
    assert named == {field.path for field in fields_of()}


def test_a_run_is_the_same_from_a_file(place: Place, tmp_path: Path) -> None:  # noqa: F811
    words = place.train(tmp_path / "by-options")
    options = dict(zip(map(str, words[1::2]), words[2::2], strict=True)) | {"--out": tmp_path / "by-file"}
    numbers = ("--steps", "--batch-size", "--threads", "--seed")
    lines = [
        f"{name[2:]} = {value if name in numbers else json.dumps(str(value))}\n" for name, value in options.items()
    ]
    by_file, by_options = train(tmp_path, "".join(lines)), run_edge(*words)
    assert by_file.code == by_options.code == 0, by_file.stderr
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("by-file", "by-options")]
    assert weights[0] == weights[1]
    assert run_edge("resume", tmp_path / "by-file", "--steps", 3).code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = ", "is not valid TOML: "),
        ("learning-rate = 1", "'learning-rate' is no setting; you mean lr"),
        ("eval-dat = 'x'", "'eval-dat' is no setting"),
        ("[train]\nlr = 1", "'train' is no setting"),
        ("lr = 1\n[data]\nx = 1", "'x' is no setting in [data]"),
        ("eval = 'a'\n[data]\neval = 'b'", "says data.eval twice"),
        ("config = 'x'", "'config' is no setting"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(text.encode(errors="surrogateescape"))
    assert_fails(run_edge("train", "--config", tmp_path / "run.toml"), USAGE, words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "rank"), "write SECTION.KEY=VALUE"),
        (("--set", "kill_revive.probations=3"), "there is no such setting; is it kill_revive.probation?"),
        (("--set", "kill_revive.probation=x"), "--set kill_revive.probation 'x'"),
        (("--set", "kill_revive.probation=-1"), "write a whole number from 0 up to"),
        (("--set", "optimizer.beta1=nan"), "is no number"),
    ],
)
def test_a_set_that_cannot_be_is_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert_fails(train(tmp_path, NEEDED, *words), USAGE, said)


def test_values_and_files_that_cannot_be(tmp_path: Path) -> None:
    assert_fails(run_edge("train", "--config", tmp_path / "none.toml"), USAGE, "cannot be read: No such file")
    assert_fails(train(tmp_path, NEEDED + 'lr = "much"\n'), USAGE, "--lr much is not understood")
    there = train(tmp_path, NEEDED, "--write-config", tmp_path / "run.toml")
    assert_fails(there, USAGE, "is there already")


# -- one field -------------------------------------------------------------------------------------------------

NEW = """
    made_up: Annotated[
        Annotated[int, Meta(ge=1, le=9)], more("A setting that a test made up.", makes_bits=True)
    ] = 3
"""
WITH_NEW_FIELD = """
import importlib.util, runpy, sys

spec = importlib.util.find_spec("dlora.edge.settings")
source = open(spec.origin).read()
before = "\\n    init_adapter: "
assert source.count(before) == 1
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
exec(compile(source.replace(before, {new!r} + before), spec.origin, "exec"), module.__dict__)
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MAIN = "from dlora.edge.__main__ import main\nimport sys\nsys.exit(main())\n"
OF_PYTHON = """
import sys
from pathlib import Path
from dlora.edge.client.training_client import TrainingClient
from dlora.edge.settings import Settings

bundle, server = sys.argv[1:]
settings = Settings.of(bundle=bundle, server=server, kind="lora", seed=0, made_up=7)
with TrainingClient.create(settings) as client:
    print(client.settings.adapter.made_up, client._training.identity.settings["adapter.made_up"])
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scripts")
    (directory / "with_new_field.py").write_text(WITH_NEW_FIELD.format(new=NEW))
    (directory / "dlora-edge").write_text(MAIN)
    (directory / "of_python.py").write_text(OF_PYTHON)
    return directory


def test_a_new_option_is_one_field(place: Place, scripts: Path, tmp_path: Path) -> None:  # noqa: F811
    """In a copy of the structure, and nowhere else."""

    def run(script: Path | str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, scripts / "with_new_field.py", scripts / script, *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, env={**environment, "COLUMNS": "100"})

    assert "--made-up" in run("dlora-edge", "train", "--help-all").stdout
    assert "--made-up" not in run("dlora-edge", "train", "--help").stdout
    wrong = run("dlora-edge", "train", "--made-up", 10)
    assert "--made-up 10 is not understood, or out of range; write a whole number from 1 up to 9" in wrong.stderr

    written = tmp_path / "written.toml"
    config = (*place.train(tmp_path / "run"), "--write-config", written)
    assert run("dlora-edge", *config, DLORA_EDGE_MADE_UP="5").returncode == 0
    assert "\nmade_up = 5\n" in written.read_text()
    out = tmp_path / "run"
    done = run("dlora-edge", "train", "--config", written)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "run.json").read_text())["settings"]["adapter"]["made_up"] == 5
    assert "--made-up" in (out / "report.html").read_text()
    record = json.loads((out / "dlora_adapter.json").read_text())
    assert record["training"]["recipe"]["made_up"] == 5
    other = run("dlora-edge", *place.train(out, steps=2), "--resume", "--made-up", 6)
    assert "--made-up 5, not 6" in other.stderr

    reference = run(ROOT / ".ci" / "reference.py", "settings.md").stdout
    assert "| `--made-up` | `made_up` | a whole number from 1 up to 9 | 3 |" in reference
    python = run("of_python.py", place.bundle, place.url)
    assert python.stdout.split() == ["7", "7"], python.stderr


def test_the_reference_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / ".ci" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for name, page in reference.PAGES.items():
        assert (reference.PLACE / name).read_text() == page(), "make reference"


# -- the command and the Python API ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(tiny: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """As many rows as it takes to hold some out."""
    data = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [{"prompt": f"w{n % 7} w2 w9", "completion": f" w{n % 5} w{n % 11}"} for n in range(32)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny("llama", head_dtype="fp32", max_position_embeddings=512)
    with serving(model.base) as server:
        yield Place(model.bundle, data, server.url)


@pytest.mark.parametrize("more", ["", "kind = 'lora'\ngrad_accum = 2\n[kill_revive]\nactive_fraction = 0.5\n"])
def test_the_client_makes_the_commands_adapter(talks: Place, tmp_path: Path, more: str) -> None:
    """Given the same settings, and next to nothing said: kind, basis, rate, schedule and held-out rows are chosen."""
    out = tmp_path / "by-command"
    text = "".join(
        f"{name} = {json.dumps(str(value))}\n"
        for name, value in {"bundle": talks.bundle, "server": talks.url, "data": talks.data, "out": out}.items()
    )
    by_command = train(tmp_path, f"{text}steps = 6\nbatch_size = 2\nthreads = 1\nseed = 3\n{more}")
    assert by_command.code == 0, by_command.stderr
    settings = Settings.of(**load_config(tmp_path / "run.toml"))
    with TrainingClient.create(settings) as client:
        for step in range(6):
            client.forward_backward(client.step_data(step), batch_size=2)
            client.optim_step()
        client.save_adapter(tmp_path / "by-client")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("by-command", "by-client")]
    assert weights[0] == weights[1]
