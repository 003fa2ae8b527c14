"""Do two commits give the same results, bit for bit? For a change of code that must change no number.

    python benchmarks/same_results.py BEFORE [AFTER]        # git revisions; AFTER is HEAD where it is left out
    python benchmarks/same_results.py BEFORE --worktree     # AFTER is what lies here, committed or not

Both commits train tiny models with random weights, each with its own server and exporter: llama, GPT-2 and Gemma 2;
each kind of adapter; blocks on the server, some of them on the device, all of them; with Kill and Revive and without;
runs that are stopped and resumed, or made longer. What is trained answers: with ``dlora-edge generate``, and through
the endpoint of ``dlora-edge serve``. A ``TrainingClient`` takes steps as well. Modules, messages and bundles may
differ: each commit is driven by its command lines and that class alone, in processes of its own, with the options of
``same_results_cases.py``.

Compared are what ``adapter_model.safetensors`` holds, rank and alpha in ``adapter_config.json``, loss, gradient norm
and units of each line of ``metrics.jsonl``, the losses in ``evaluations.jsonl``, what ``dlora-edge evaluate`` finds for
the saved adapter, and answers with their log-probabilities. Times and bytes on the wire are not. Models and the
software that both commits stand on are those of this environment; everything computes with one thread.

Prints one JSON object. Exit code 0: equal; 1: not equal; 2: one of the commits could not be run to the end.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt
from children import log
from safetensors.numpy import load_file
from same_results_cases import CASES, CLIENT, FIRST_PART, MODELS, RUN_OPTIONS, STEPS, STOPPED_AFTER, Case

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TIMEOUT_S: Final = 120.0
TRAIN: Final = "train.jsonl"
HELD_OUT: Final = "held-out.jsonl"


@dataclass(frozen=True)
class Result:
    """What a run left behind: adapter weights by PEFT's names, and exact values by the place they are from."""

    tensors: dict[str, npt.NDArray[Any]]
    steps: int
    values: dict[str, dict[str, str]]


def fail(text: str) -> NoReturn:
    log(f"error: {text}")
    raise SystemExit(2)


class Commit:
    """A commit's command lines.

    Args:
        name: what messages call it.
        checkout: where its files are.
        scratch: an empty folder, for everything that it makes.
    """

    def __init__(self, name: str, checkout: Path, scratch: Path) -> None:
        self.name = name
        self.scratch = scratch
        self.modules = _link_packages(checkout, scratch / "site")
        self._environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(scratch / "site"), os.environ.get("PYTHONPATH")))),
            "DLORA_EDGE_STATE": str(scratch / "edge-state"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
            "NO_COLOR": "1",
            "TERM": "dumb",
        }
        self._check_modules(checkout)

    def start(self, *command: str, stderr: Path) -> subprocess.Popen[str]:
        # In the scratch folder: python -m looks for modules in the working directory first.
        with stderr.open("w") as log_file:
            return subprocess.Popen(
                [sys.executable, *command], stdout=subprocess.PIPE, stderr=log_file, text=True, env=self._environment,
                cwd=self.scratch,
            )  # fmt: skip

    def run(self, *command: str) -> str:
        """Run a Python command to its end; what it printed."""
        stderr = self.scratch / "stderr.txt"
        process = self.start(*command, stderr=stderr)
        stdout = process.communicate()[0]
        if process.returncode:
            self.give_up(command, process.returncode, stderr)
        return stdout

    def give_up(self, command: tuple[str, ...], code: int | None, stderr: Path) -> NoReturn:
        log(stderr.read_text()[-3000:])
        fail(f"{self.name}: {' '.join(command)} ended with {code}; its last words are above")

    @contextlib.contextmanager
    def listening(self, *command: str) -> Iterator[str]:
        """A command that listens; the address that it prints first."""
        stderr = self.scratch / f"{command[1]}.txt"
        process = self.start(*command, stderr=stderr)
        try:
            assert process.stdout is not None
            address = re.search(r"(ws|http)://[\w.]+:\d+", process.stdout.readline())
            if address is None:
                self.give_up(command, process.poll(), stderr)
            yield address[0]
        finally:
            process.terminate()
            process.wait(60)

    def _check_modules(self, checkout: Path) -> None:
        code = "import importlib.util as u, sys\nfor name in sys.argv[1:]: print(u.find_spec(name).origin)"
        for name, found in zip(self.modules, self.run("-c", code, *self.modules).splitlines(), strict=True):
            if not Path(found).resolve().is_relative_to(checkout.resolve()):
                fail(f"{self.name}: {name} would be taken from {found}, not from {checkout}")


def _link_packages(checkout: Path, site: Path) -> list[str]:
    """Make the packages that ``pyproject.toml`` names importable from ``site``; their names."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())
    folders: dict[str, str] = project["tool"]["setuptools"].get("package-dir", {})
    if "" in folders or not folders:
        fail(f"{checkout}: pyproject.toml does not say in package-dir where each package is")
    for name, folder in folders.items():
        place = site.joinpath(*name.split("."))
        place.mkdir(parents=True, exist_ok=True)  # a folder of its own: its packages may be elsewhere in the checkout
        for each in (checkout.resolve() / folder).iterdir():
            (place / each.name).symlink_to(each)
    return list(folders)


def check_out(revision: str, place: Path) -> str:
    """A revision's files in ``place``; its whole name."""
    git = ("git", "-C", str(ROOT))
    found = subprocess.run([*git, "rev-parse", "--verify", f"{revision}^{{commit}}"], capture_output=True, text=True)
    if found.returncode:
        fail(f"{revision} is no commit of this repository")
    archive = subprocess.run([*git, "archive", found.stdout.strip()], capture_output=True, check=True).stdout
    place.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive, check=True)
    return found.stdout.strip()


def words_of(options: Mapping[str, str]) -> list[str]:
    """As a command line has them: each option once for each word of its value."""
    return [word for option, value in options.items() for each in value.split() for word in (option, each)]


def make_material(place: Path) -> None:
    """For each family a tiny model, ``FAMILY``, and sequences of 5 to 45 tokens to train and to evaluate on,
    ``FAMILY-train.jsonl`` and ``FAMILY-held-out.jsonl``: chats for llama, pairs for the others."""
    from families import save_tiny

    for family, changes in MODELS.items():
        save_tiny(place / family, family, **changes)
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{draw.randrange(80)}" for _ in range(draw.randint(least, most)))

    for name, count in ((TRAIN, 61), (HELD_OUT, 13)):
        chats, pairs = list[dict[str, Any]](), list[dict[str, Any]]()
        for _ in range(count):
            turns = [{"role": role, "content": words(1, 8)} for role in ("user", "assistant") * draw.randint(1, 2)]
            chats.append({"messages": turns})
            pairs.append({"prompt": words(3, 30), "completion": f" {words(1, 12)}"})
        for family in MODELS:
            rows = chats if family == "llama" else pairs
            (place / f"{family}-{name}").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_commit(commit: Commit, material: Path, cases: Sequence[Case]) -> dict[str, Result]:
    """Every case with one commit."""
    results: dict[str, Result] = {}
    bundles: dict[tuple[str, ...], Path] = {}
    for model in dict.fromkeys(case.model for case in cases):
        directory, state = str(material / model), str(commit.scratch / "cloud-state")
        serve = ("serve", directory, "--port", "0", "--threads", "1", "--json", "--state-dir", state)
        with commit.listening("-m", "dlora.cloud", *serve) as server:
            for case in (case for case in cases if case.model == model):
                started = time.monotonic()
                export = words_of(case.bundle)
                key = (model, *export)
                if key not in bundles:
                    bundles[key] = commit.scratch / f"bundle-{len(bundles)}"
                    commit.run("-m", "dlora.export", directory, "--out", str(bundles[key]), *export)
                run = run_client if case.way == "client" else run_case
                results[case.name] = run(commit, case, material, bundles[key], server)
                log(f"{commit.name}: {case.name}: {time.monotonic() - started:.1f} s")
    return results


def run_case(commit: Commit, case: Case, material: Path, bundle: Path, server: str) -> Result:
    out = commit.scratch / f"run-{CASES.index(case)}"
    data, held_out = (str(material / f"{case.model}-{name}") for name in (TRAIN, HELD_OUT))
    run = ["--bundle", str(bundle), *(("--server", server) if case.has_server else ())]
    steps = FIRST_PART if case.way == "longer" else STEPS
    options = {"--kind": "lora", **RUN_OPTIONS, **case.options, "--steps": str(steps), "--eval": held_out}
    train = ("-m", "dlora.edge", "train", *run, "--data", data, "--out", str(out), *words_of(options))
    if case.way == "resumed":
        stop_on_the_way(commit, train, out / "metrics.jsonl")
        commit.run("-m", "dlora.edge", "resume", str(out))
    else:
        commit.run(*train)
    if case.way == "longer":
        commit.run("-m", "dlora.edge", "resume", str(out), "--steps", str(STEPS))
    trained = (*run, "--adapter", str(out), "--wire-dtype", "fp32", "--engine", "onnx", "--threads", "1", "--json")
    found = commit.run("-m", "dlora.edge", "evaluate", *trained, "--data", held_out)
    try:
        result = read_result(out, json.loads(found))
    except (KeyError, OSError, ValueError) as error:
        fail(f"{commit.name}: {case.name}: read_result does not know what this commit wrote: {error!r}")
    check_case(commit, case, result)
    if case.answers:
        result.values["answers"] = {"generate": ask_command(commit, trained), "serve": ask_endpoint(commit, trained)}
    return result


def run_client(commit: Commit, case: Case, material: Path, bundle: Path, server: str) -> Result:
    """Steps of a loop of one's own."""
    out, data = commit.scratch / "client", material / f"{case.model}-{TRAIN}"
    printed = commit.run("-c", CLIENT, str(bundle), server, str(out), str(data), str(STEPS))
    *steps, after = map(json.loads, printed.splitlines())
    evaluations = {"afterwards": exact(after["loss"]), "log-probabilities": json.dumps(after["logprobs"])}
    values = {**_of_steps(steps), "evaluations": evaluations}
    return Result(load_file(out / "adapter_model.safetensors"), len(steps), values)


def ask_command(commit: Commit, arguments: tuple[str, ...]) -> str:
    """An answer that is drawn, with its log-probabilities."""
    options = ("--prompt", "w1 w2 w3", "--max-new-tokens", "16", "--temperature", "1", "--seed", "3", "--logprobs", "2")
    found = json.loads(commit.run("-m", "dlora.edge", "generate", *arguments, *options))
    return json.dumps([found["answer"], found["finish_reason"], found["logprobs"]])


def ask_endpoint(commit: Commit, arguments: tuple[str, ...]) -> str:
    """The choices of an answer over HTTP."""
    with commit.listening("-m", "dlora.edge", "serve", *arguments, "--port", "0") as address:
        asked = {"messages": [{"role": "user", "content": "w4 w5"}], "max_tokens": 16, "temperature": 1, "seed": 3}
        model = json.loads(_fetched(commit, f"{address}/v1/models"))["data"][0]["id"]
        body = json.dumps({**asked, "model": model, "logprobs": True, "top_logprobs": 2}).encode()
        found = _fetched(commit, f"{address}/v1/chat/completions", body)
        return json.dumps(json.loads(found)["choices"])


def _fetched(commit: Commit, url: str, body: bytes | None = None) -> bytes:
    """What the endpoint has there, once it is ready."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return bytes(urllib.request.urlopen(request, timeout=TIMEOUT_S).read())
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > deadline:
                fail(f"{commit.name}: {url}: {error}: {error.read().decode()}")
        time.sleep(0.1)


def stop_on_the_way(commit: Commit, train: tuple[str, ...], metrics: Path) -> None:
    """Train, and ask to stop in the middle; it saves and says so with 130."""
    stderr = commit.scratch / "stopped.txt"
    process = commit.start(*train, stderr=stderr)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_bytes().count(b"\n") >= STOPPED_AFTER:
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.005)
        process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        process.wait()
    if process.returncode != 130:  # 0: it was faster than its end could be asked for
        commit.give_up(train, process.returncode, stderr)


def read_result(out: Path, evaluation: dict[str, Any]) -> Result:
    """What is compared. The names of keys and files are here, and nowhere else."""
    config = json.loads((out / "adapter_config.json").read_text())
    files = ((out / name).read_text().splitlines() for name in ("metrics.jsonl", "evaluations.jsonl"))
    steps, evaluations = ([json.loads(line) for line in lines] for lines in files)
    after = {f"after {row['step']} steps": exact(row["loss"]) for row in evaluations}
    values = {
        "adapter_config": {name: exact(config[name]) for name in ("r", "lora_alpha")},
        **_of_steps(steps),
        "units": {f"step {row['step']}": row["units"] for row in steps},
        "evaluations": {**after, "of the saved adapter": exact(evaluation["loss"])},
    }
    return Result(load_file(out / "adapter_model.safetensors"), len(steps), values)


def _of_steps(rows: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    return {
        "losses": {f"step {row['step']}": exact(row["loss"]) for row in rows},
        "grad_norms": {f"step {row['step']}": exact(row["grad_norm"]) for row in rows},
    }


def exact(number: float) -> str:
    """A float's shortest decimals, which no other float has; it tells 0.0 from -0.0, and NaN equals itself."""
    return repr(float(number))


def check_case(commit: Commit, case: Case, result: Result) -> None:
    """A run that does not do what it is here for would show nothing."""
    if result.steps != STEPS:
        fail(f"{commit.name}: {case.name}: metrics.jsonl has {result.steps} steps of {STEPS}")
    if not result.tensors or len(set(result.values["losses"].values())) < STEPS // 2:
        fail(f"{commit.name}: {case.name}: nothing was trained")
    if bool(units_revived(result)) != case.has_kills:
        fail(f"{commit.name}: {case.name}: {units_revived(result)} units were killed and revived later")


def units_revived(result: Result) -> int:
    """How many units changed their state twice at least: from trained to not trained, and back."""
    histories = zip(*result.values.get("units", {}).values(), strict=True)
    return sum(re.search("1[^1]+1", "".join(history)) is not None for history in histories)


def difference_of_tensors(before: Mapping[str, npt.NDArray[Any]], after: Mapping[str, npt.NDArray[Any]]) -> str | None:
    """Where they first differ; None where no bit does."""
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            return f"{name}: only {'before' if name in before else 'after'}"
        old, new = before[name], after[name]
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"{name}: {old.dtype} {old.shape} before, {new.dtype} {new.shape} after"
        if old.tobytes() != new.tobytes():
            bits = np.dtype(f"u{old.dtype.itemsize}")
            differ = np.flatnonzero(old.reshape(-1).view(bits) != new.reshape(-1).view(bits))
            first = differ[0]
            pair = f"{exact(old.flat[first])} before, {exact(new.flat[first])} after"
            return f"{name}: {len(differ)} of {old.size} numbers; number {first}: {pair}"
    return None


def difference_of_values(before: Mapping[str, str], after: Mapping[str, str]) -> str | None:
    """Where they first differ, in the order of ``before``; None where they are equal."""
    for place in dict.fromkeys((*before, *after)):
        old, new = before.get(place), after.get(place)
        if old != new:
            return f"{place}: {old} before, {new} after"
    return None


def compare(case: Case, before: Result, after: Result) -> dict[str, Any]:
    differences = {"tensors": difference_of_tensors(before.tensors, after.tensors)}
    for kind in before.values:
        differences[kind] = difference_of_values(before.values[kind], after.values[kind])
    return {
        "case": case.name,
        "tensors": len(before.tensors),
        "steps": before.steps,
        "evaluations": len(before.values["evaluations"]),
        "units": len(before.values.get("units", {}).get("step 0", "")),
        "units_revived": units_revived(before),
        "equal": {kind: difference is None for kind, difference in differences.items()},
        "first_differences": {kind: text for kind, text in differences.items() if text is not None},
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE")
    parser.add_argument("after", metavar="AFTER", nargs="?", default="HEAD")
    parser.add_argument("--worktree", action="store_true", help="AFTER is this working tree")
    parser.add_argument("--only", metavar="CASE", nargs="+", default=["*"], help="these, and not all; * is a wildcard")
    options = parser.parse_args()
    chosen = [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only)]
    if not chosen:
        fail(f"--only names none of: {'; '.join(case.name for case in CASES)}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dlora-same-") as name:
        place, commits, names = Path(name), list[Commit](), dict[str, str]()
        log("making tiny models")
        make_material(place)
        for side, revision in {"before": options.before, "after": options.after}.items():
            is_here = side == "after" and options.worktree
            checkout, scratch = ROOT if is_here else place / side / "checkout", place / side / "scratch"
            names[side] = "worktree" if is_here else check_out(revision, checkout)
            scratch.mkdir(parents=True)
            commits.append(Commit(side, checkout, scratch))
        before, after = (run_commit(commit, place, chosen) for commit in commits)
    cases = [compare(case, before[case.name], after[case.name]) for case in chosen]
    equal = all(all(case["equal"].values()) for case in cases)
    summary = {**names, "equal": equal, "seconds": round(time.monotonic() - started)}
    print(json.dumps({**summary, "cases": cases}, indent=1))
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
