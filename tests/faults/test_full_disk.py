"""A disk that is full at one file, for every file that a command writes: what was there is intact, and the run goes on.

The files are those that an undisturbed command opened for writing, so a new one is tried as well.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from drawn import one_in
from fault_run import DAY_S, STEPS, Place, Replicas, answer_gate, make_place, replicas, write_data
from forked import Command, fork_command
from matrix import SERVER
from test_tensorboard import scalars_of

from dlora.edge.adapters.peft import WEIGHTS_NAME
from dlora.edge.training.checkpoint import list_checkpoints
from dlora.protocol.errors import StorageError

CONVENIENCES = re.compile(r"report\.html|tensorboard/|trace\.json")
"""What a run leaves for people to look at: it goes on without."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def running(place: Place) -> Iterator[Replicas]:
    with replicas(place, place.directory / "servers", SERVER, count=1) as found:
        yield found


@dataclass
class Ended:
    """How a command went: what files it opened for writing, what it said, and its exit code."""

    files: list[str]
    said: list[str]
    code: int

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said if line.startswith("error: ")]


def run(
    directory: Path, words: Sequence[object], full_at: str | None = None, jump: Callable[[Command], None] | None = None
) -> Ended:
    """Run a ``dlora-edge`` command; the disk is full whenever it opens this file under ``directory``.

    ``jump`` is called whenever it opens a checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory.with_suffix(".log")
    log.unlink(missing_ok=True)
    state = {"DLORA_EDGE_STATE": str(directory.with_suffix(".state"))}
    command = fork_command("edge", words, log, watch=directory, **state)
    files: list[str] = []

    def is_full(text: str) -> bool:
        event, _, name = text.partition(" ")
        if event == "open":
            files.append(general(name))
        if jump is not None and event == "open" and "checkpoint" in name:
            jump(command)
        return event == "open" and general(name) == full_at

    answering = answer_gate(command, is_full)
    code = command.end()
    answering.join()
    return Ended(list(dict.fromkeys(files)), log.read_text().splitlines(), code)


def general(name: str) -> str:
    """A file's name without the numbers and the machine in it."""
    return re.sub(r"tfevents.*", "tfevents", re.sub(r"\d+", "N", name))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def training(place: Place, running: Replicas, directory: Path) -> list[object]:
    """All that a run may write, below ``directory``."""
    return [
        "train", "--bundle", place.bundle, "--server", running.url(0), "--data", place.data, "--eval", place.data,
        "--eval-every", 2, "--out", directory / "out", *place.train, "--tensorboard",
        "--profile", directory / "trace.json", "--profile-steps", 1,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(place: Place, running: Replicas) -> tuple[Path, list[str]]:
    """An undisturbed run, and the files that it wrote."""
    directory = place.directory / "whole"
    ended = run(directory, training(place, running, directory))
    assert ended.code == 0, ended.said
    return directory / "out", ended.files


@pytest.mark.slow
def test_a_run_survives_a_full_disk_at_each_of_its_files(
    place: Place, running: Replicas, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    undisturbed, files = whole
    assert len(files) > 10, files
    some = ("checkpoint", "summary.json")
    always = [name for name in files if CONVENIENCES.search(name) or any(each in name for each in some)]
    wrong = {}
    for index, name in enumerate(dict.fromkeys([*always, *one_in(2, files)])):
        directory = tmp_path / str(index)
        words = training(place, running, directory)
        ended = run(directory, words, name)
        found = [line for line in ended.said if "Traceback" in line]
        if CONVENIENCES.search(name):
            told = [line for line in ended.said if "No space left" in line]
            if (ended.code, len(told)) != (0, 1):
                found.append(f"{ended.code}: {ended.said[-3:]}")
        else:
            if (ended.code, len(ended.errors)) != (StorageError.exit_code, 1):
                found.append(f"{ended.code}: {ended.said[-3:]}")
            ended = run(directory, [*words, "--resume"])
            if ended.code or any("damaged" in line for line in ended.said):
                found.append(f"resumed: {ended.code}: {ended.said[-3:]}")
        found += [f"no {each}" for each in different(directory / "out", undisturbed)]
        if found:
            wrong[name] = found
        shutil.rmtree(directory)
    assert not wrong, json.dumps(wrong, indent=1)


COMMANDS: dict[str, tuple[object, ...]] = {
    "evaluate": ("--answers", "exact", "--save", "at/answers.jsonl", "--record", "at/recording"),
    "generate": ("--prompt", "w1 w2", "--max-new-tokens", 2, "--record", "at/recording"),
    "compare": ("--out", "at/page.html"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_line_where_the_disk_is_full_at_one_of_its_files(
    command: str, place: Place, running: Replicas, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    answers, other = tmp_path / "answers.jsonl", tmp_path / "other"
    write_data(answers, rows=2, answers=True)
    shutil.copytree(whole[0], other)
    asked = ("--bundle", place.bundle, "--server", running.url(0))
    first = {"evaluate": (*asked, "--data", answers), "generate": asked, "compare": (whole[0], other)}[command]

    def words(directory: Path) -> list[object]:
        more = [str(each).replace("at/", f"{directory}/") for each in COMMANDS[command]]
        return [command, *first, *more]

    undisturbed = run(tmp_path / "whole", words(tmp_path / "whole"))
    assert undisturbed.code == 0, undisturbed.said
    assert undisturbed.files
    for index, name in enumerate(undisturbed.files):
        directory = tmp_path / str(index)
        ended = run(directory, words(directory), name)
        told = [line for line in ended.said if "No space left" in line]
        assert (ended.code, len(told)) == (StorageError.exit_code, 1), (name, ended.said[-3:])
        assert not any("Traceback" in line for line in ended.said)


def test_a_clock_that_jumps_shows_nowhere(
    place: Place, running: Replicas, whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Back by days, and ahead, between steps: progress, metrics, trace and curves have times that were."""
    jumps = itertools.cycle((-3 * DAY_S, DAY_S, -DAY_S))
    directory = tmp_path / "run"
    words = training(place, running, directory)
    ended = run(directory, words, jump=lambda command: command.clocks.jump(wall=next(jumps)))
    assert ended.code == 0, ended.said
    out = directory / "out"
    assert not different(out, whole[0])
    for line in (out / "metrics.jsonl").read_text().splitlines():
        times = {name: value for name, value in json.loads(line).items() if name.endswith("_s")}
        assert all(0 <= value < DAY_S / 24 for value in times.values()), times
    etas = [found for line in ended.said for found in re.findall(r"eta (\S+)", line)]
    assert etas
    assert all(re.fullmatch(r"0:\d\d", eta) for eta in etas), etas
    spans = [each for each in json.loads((directory / "trace.json").read_text())["traceEvents"] if "dur" in each]
    assert spans
    assert all(0 <= each["dur"] < 1e6 * DAY_S / 24 for each in spans)  # microseconds
    scalars_of(out / "tensorboard")  # which checks that times do not go back


def different(out: Path, undisturbed: Path) -> list[str]:
    """What two runs do not have in common, of what a run is for."""
    names = [WEIGHTS_NAME, f"best/{WEIGHTS_NAME}", "evaluations.jsonl"]
    here, there = contents(out), contents(undisturbed)
    found = [name for name in names if here.get(name) != there[name]]
    steps = [json.loads(line)["step"] for line in here.get("metrics.jsonl", b"").splitlines()]
    last, wanted = (list_checkpoints(each / "checkpoints")[:1] for each in (out, undisturbed))
    return [*found, *(["all steps"] if steps != list(range(STEPS)) else []),
            *(["last checkpoint"] if [each[0] for each in last] != [each[0] for each in wanted] else [])]  # fmt: skip
