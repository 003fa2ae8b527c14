"""Do the tests notice small changes of the code, mutants? Of each a test should fail.

    python benchmarks/mutants.py                        # the tests that lie here
    python benchmarks/mutants.py --earlier e043fab      # and what of those that survive an earlier commit's tests kill

Mutants are cosmic-ray's (an operator, a number, a comparison, an exception … is another). ``--count`` of them are drawn
with a seed from ``ROOMS``; with ``--earlier`` only from files that are the same in that commit, so that both sets of
tests can meet them. ``make test`` under coverage says which tests run a changed line. Of these, one case of each
function comes first, then the others, the quickest first, until one fails or ``LONGEST_S`` are over. What fails without
the change too does not count.

A mutant that survives meets, with ``--earlier``, what that commit's tests had and these have not: cases that are gone
or whose function reads otherwise, of functions that run the line or are gone themselves. What they kill is a loss.

Works in copies of the commits under ``build/mutants`` and keeps there what was done: it goes on where it was stopped.
Prints one JSON object; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final
from xml.etree import ElementTree

import cosmic_ray.plugins
import coverage
from children import log
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

ROOT: Final = Path(__file__).resolve().parents[1]
WORK: Final = ROOT / "build" / "mutants"
PACKAGES: Final = ("protocol", "edge", "cloud", "export")
ROOMS: Final = ("protocol", "edge/training", "edge/model", "cloud/exchange", "export/graphs")
LEFT_OUT: Final = ("slow", "arm", "release")  # markers of tests that are no part of ``make test``
LONGEST_S: Final = 90.0  # of tests for one mutant, by the times that they took undisturbed
MOST_S: Final = 600.0  # of the clock for one mutant
TEST_TIMEOUT_S: Final = 120
NOTHING_RUNS: Final = "no test begins"


@dataclass(frozen=True)
class Mutant:
    """``operator`` of cosmic-ray's, applied to its ``occurrence``-th place in ``path``; the lines that it changes."""

    path: str
    operator: str
    occurrence: int
    first: int
    last: int

    def of(self, source: str) -> str | None:
        """``source`` with the change; None where nothing changes, or what comes out is no Python."""
        changed = mutate_code(source, cosmic_ray.plugins.get_operator(self.operator)(), self.occurrence)
        return changed if changed and changed != source and _is_python(changed) else None


@dataclass(frozen=True)
class Result:
    """What came of a mutant: the test that failed; None: it survived ``tried`` tests of ``covering``."""

    mutant: Mutant
    killed_by: str | None
    tried: int
    covering: int
    seconds: float


def main() -> None:
    """Print what came of every mutant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="HEAD", help="whose code is changed, and whose tests meet it")
    parser.add_argument("--earlier", metavar="COMMIT", help="whose tests meet what survives")
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--seed", type=int, default=30)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    here = _git("rev-parse", "--short", options.commit)
    copies = [Copy(here, number) for number in range(options.processes)]
    covering = Covering(copies[0])
    changed = _git("diff", "--name-only", here, options.earlier).splitlines() if options.earlier else []
    mutants = sample(copies[0].path, options.count, options.seed, set(changed))
    results = list(run(mutants, copies, covering.chosen, "now"))
    seconds = sum(result.seconds for result in results)
    found = {"commit": here, "seed": options.seed, "date": time.strftime("%Y-%m-%d"), **summary(results)}
    if options.earlier:
        earlier, now = _git("rev-parse", "--short", options.earlier), copies[0].cases()
        copies = [Copy(earlier, number) for number in range(options.processes)]
        lost = [case for case, source in copies[0].cases().items() if now.get(case) != source]
        there = set(map(_function_of, now))
        log(f"{len(lost)} cases of {earlier} are gone or changed")

        def cases(mutant: Mutant) -> tuple[list[str], int]:
            reach_it = covering.functions(mutant)
            tests = [case for case in lost if _function_of(case) in reach_it or _function_of(case) not in there]
            return tests, len(tests)

        again = list(run([result.mutant for result in results if result.killed_by is None], copies, cases, "earlier"))
        seconds += sum(result.seconds for result in again)
        killed = _told(each for each in again if each.killed_by)
        stopped = sum(each.killed_by is None and each.seconds >= MOST_S for each in again)
        of_earlier = {"commit": earlier, "met": len(again), "stopped_before_all_ran": stopped}
        found["earlier"] = {**of_earlier, "killed": killed, "holds": not killed}
    print(json.dumps(found | {"minutes": round(seconds / 60 / options.processes)}, indent=1))


class Copy:
    """A commit in a directory of its own, and how its tests are run there."""

    def __init__(self, commit: str, number: int) -> None:
        self.path = WORK / commit / f"copy-{number}"
        self.log = WORK / commit
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _git("worktree", "add", "--force", "--detach", str(self.path), commit)
        _git("-C", str(self.path), "checkout", "--", ".")  # it may have been stopped within a mutant
        site = WORK / commit / f"site-{number}" / "dlora"
        site.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            if not (site / package).is_symlink():
                (site / package).symlink_to(self.path / package)
        if (ROOT / "build" / "shim").exists() and not (self.path / "build").exists():
            (self.path / "build").mkdir()
            (self.path / "build" / "shim").symlink_to(ROOT / "build" / "shim")
        markers = (self.path / "pyproject.toml").read_text()
        self._fast = " and ".join(f"not {marker}" for marker in LEFT_OUT if f'"{marker}:' in markers)
        # Before the installed one, which is that of ROOT.
        self._environment = {**os.environ, "PYTHONPATH": str(site.parent), "DLORA_TEST_DAY": "0"}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # tests are begun hundreds of times

    def cases(self) -> dict[str, str]:
        """``tests/file.py::name[case]`` of all tests, and how their functions read."""
        done = self.pytest("--collect-only")
        cases = [line for line in done.stdout.splitlines() if "::" in line]
        functions = {
            (path, node.name): ast.unparse([node.args, *node.body])  # without its cases
            for path in {case.partition("::")[0] for case in cases}
            for node in ast.walk(ast.parse((self.path / path).read_text()))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        names = ((case.partition("::")[0], _function_of(case).rpartition("::")[2]) for case in cases)
        return {case: functions.get(name, "") for case, name in zip(cases, names, strict=True)}

    def pytest(self, *arguments: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
        program = str(Path(sys.executable).with_name("pytest"))
        return subprocess.run(
            [program, "-q", "-p", "no:cacheprovider", "-m", self._fast, *arguments],
            cwd=self.path, env=self._environment,
            capture_output=True, text=True, timeout=timeout_s, check=False,
        )  # fmt: skip


class Covering:
    """Which tests run a line, and how long each of them takes."""

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        data, times = copy.path / ".coverage", copy.log / "times.xml"
        if not times.exists():
            log("measuring which tests run which lines; this takes twice as long as the tests")
            measured = ("--cov", "--cov-context=test", "--cov-report=", f"--junitxml={times}")
            done = copy.pytest("-n", "3", "--dist", "loadfile", *measured)
            if not data.exists():
                raise SystemExit(f"error: the tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        self._seconds = dict(_times(times, copy.path))
        self._data = coverage.CoverageData(str(data))
        self._data.read()

    def _tests(self, mutant: Mutant) -> list[str]:
        """Of each function one, the quickest first; then the others."""
        contexts = self._data.contexts_by_lineno(str(self._copy.path / mutant.path))
        lines = range(mutant.first, mutant.last + 1)
        named = {_test_of(context) for line in lines for context in contexts.get(line, ())}
        if not named & set(self._seconds):  # it is run when the file is imported
            named = {_test_of(context) for line in contexts.values() for context in line}
        # A file without functions may be of use to any of them.
        known = named & set(self._seconds) or set(self._seconds)
        tests = sorted(known, key=lambda test: (self._seconds[test], test))
        first = {_function_of(test): test for test in reversed(tests)}
        ahead = set(first.values())
        return [*(test for test in tests if test in ahead), *(test for test in tests if test not in ahead)]

    def functions(self, mutant: Mutant) -> set[str]:
        """Of tests that run it."""
        return set(map(_function_of, self._tests(mutant)))

    def chosen(self, mutant: Mutant) -> tuple[list[str], int]:
        """The tests that it meets, and how many there are."""
        tests, left_s, chosen = self._tests(mutant), LONGEST_S, []
        for test in tests:
            if self._seconds[test] <= left_s:
                left_s -= self._seconds[test]
                chosen.append(test)
        return chosen, len(tests)


def sample(root: Path, count: int, seed: int, changed: Collection[str]) -> list[Mutant]:
    """So many mutants of files that are not among ``changed``; of each room about as many as it has places."""
    files = (path for room in ROOMS for path in sorted((root / room).rglob("*.py")))
    paths = [name for name in (str(path.relative_to(root)) for path in files) if name not in changed]
    places = [mutant for path in paths for mutant in mutants_of(root, path)]
    random.Random(seed).shuffle(places)
    changing = (mutant for mutant in places if mutant.of((root / mutant.path).read_text()) is not None)
    found = list(islice(changing, count))
    log(f"{len(found)} of {len(places)} mutants in {len(paths)} files")
    return found


def mutants_of(root: Path, path: str) -> Iterator[Mutant]:
    """Every place that an operator without arguments can change, but in annotations, which nothing runs."""
    source = (root / path).read_text()
    annotations = set(_annotation_places(ast.parse(source)))
    tree = get_ast(source)
    for name in sorted(cosmic_ray.plugins.operator_names()):
        kind = cosmic_ray.plugins.get_operator(name)
        if kind.arguments():
            continue
        positions = (place for node in ast_nodes(tree) for place in kind().mutation_positions(node))
        for occurrence, ((first, column), (last, _)) in enumerate(positions):
            if (first, column) not in annotations:
                yield Mutant(path, name, occurrence, first, last)


def run(mutants: list[Mutant], copies: list[Copy], tests_of: Any, name: str) -> Iterator[Result]:
    """Each result, in order; those that are known from before are not run again."""
    file = copies[0].log / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    results = [Result(**{**row, "mutant": Mutant(**row["mutant"])}) for row in rows]
    known = {result.mutant: result for result in results}
    idle: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        idle.put(copy)

    def one(mutant: Mutant) -> Result:
        if mutant in known:
            return known[mutant]
        copy, (tests, covering) = idle.get(), tests_of(mutant)
        try:
            result = try_mutant(mutant, copy, tests, covering)
        finally:
            idle.put(copy)
        with file.open("a") as lines:
            lines.write(json.dumps(asdict(result)) + "\n")
        log(f"{mutant.path}:{mutant.first} {mutant.operator.partition('/')[2]}: {result.killed_by or 'survived'}")
        return result

    with ThreadPoolExecutor(len(copies)) as pool:
        yield from pool.map(one, mutants)


def try_mutant(mutant: Mutant, copy: Copy, tests: list[str], covering: int) -> Result:
    """Run tests until one fails."""
    started = time.perf_counter()
    path = copy.path / mutant.path
    source = _git("show", f"{copy.log.name}:{mutant.path}") + "\n"
    changed = mutant.of(source)
    assert changed is not None
    while True:
        path.write_text(changed)
        try:
            killed_by = _first_failure(copy, tests)
        finally:
            path.write_text(source)
        if killed_by == NOTHING_RUNS and copy.pytest("--collect-only", *tests).returncode:
            killed_by = None  # none of them begins without the change either
        if killed_by is None or killed_by == NOTHING_RUNS or _first_failure(copy, [killed_by]) is None:
            break
        tests = [test for test in tests if _function_of(test) != _function_of(killed_by)]
    return Result(mutant, killed_by, len(tests), covering, round(time.perf_counter() - started, 1))


def _first_failure(copy: Copy, tests: Sequence[str]) -> str | None:
    if not tests:
        return None
    try:
        done = copy.pytest("-x", "--timeout", str(TEST_TIMEOUT_S), "-rfE", *tests, timeout_s=MOST_S)
    except subprocess.TimeoutExpired:
        return None  # its tests are slow; each has a limit of its own
    if done.returncode in (0, 5):  # 5: none was collected
        return None
    told = done.stdout.rpartition("short test summary info")[2]  # before it stands what tests logged
    lines = [line.partition(" ") for line in told.splitlines()]
    failed = [rest.partition(" - ")[0] for word, _, rest in lines if word in ("FAILED", "ERROR")]
    return failed[0] if failed else NOTHING_RUNS


def summary(results: list[Result]) -> dict[str, Any]:
    """How many of each room were killed, and which were not."""
    rooms = {room: [each for each in results if each.mutant.path.startswith(f"{room}/")] for room in sorted(ROOMS)}
    killed = {room: sum(each.killed_by is not None for each in some) for room, some in rooms.items()}
    return {
        "mutants": len(results),
        "killed": sum(killed.values()),
        "rooms": {room: {"mutants": len(some), "killed": killed[room]} for room, some in rooms.items() if some},
        "survived": _told(each for each in results if each.killed_by is None),
    }


def _told(results: Iterable[Result]) -> list[dict[str, Any]]:
    return [
        {
            "at": f"{each.mutant.path}:{each.mutant.first}",
            "operator": f"{each.mutant.operator.partition('/')[2]} {each.mutant.occurrence}",
            "tests": f"{each.tried} of {each.covering}",
            **({"killed_by": each.killed_by} if each.killed_by else {}),
        }
        for each in results
    ]


def _annotation_places(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """Line and column of all that stands in an annotation."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if isinstance(found := getattr(node, field, None), ast.expr) and found.lineno == found.end_lineno:
                assert found.end_col_offset is not None
                yield from ((found.lineno, column) for column in range(found.col_offset, found.end_col_offset))


def _function_of(case: str) -> str:
    """``tests/file.py::test`` of ``tests/file.py::test[case]``."""
    return case.partition("[")[0]


def _test_of(context: str) -> str:
    """``tests/file.py::test[case]`` of a context: a test's phase, or a command's that a test has started."""
    last = re.split(r" \((?:call|setup|teardown)\)\|", context)[-1]
    return re.sub(r"\|(run|setup|teardown)$| \((call|setup|teardown)\)$", "", last)


def _times(path: Path, root: Path) -> Iterator[tuple[str, float]]:
    """The name of each test that passes undisturbed, as coverage has it, and its seconds."""
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            continue
        file, inner = Path(case.get("classname", "").replace(".", "/")), str(case.get("name"))
        while not (root / file).with_suffix(".py").exists() and file.name:  # a class
            file, inner = file.parent, f"{file.name}::{inner}"
        yield f"{file}.py::{inner}", float(case.get("time", "0"))


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
