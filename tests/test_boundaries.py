"""Who may import whom, where import-linter cannot see it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("protocol", "edge", "cloud", "export")
FOLDERS = (*PACKAGES, "tests", "benchmarks", "examples")
SOURCES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))


def _imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_bare_names_and_no_pickle(path: Path) -> None:
    # From the repository root `import protocol` works too, and gives other classes than dlora.protocol.
    assert not _imports(ast.parse(path.read_text())) & {*PACKAGES, "pickle", "dill", "cloudpickle", "marshal", "shelve"}


def test_importing_the_whole_edge_leaves_torch_unloaded() -> None:
    modules = [f"dlora.edge.{path.stem}" for path in (ROOT / "edge").glob("*.py") if path.stem != "__init__"]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "bad = {'torch', 'transformers', 'peft', 'onnx', 'dlora.cloud', 'dlora.export'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


@pytest.mark.parametrize(("package", "banned"), [("protocol", {"asyncio", "websockets", "time", "torch", "socket"})])
def test_the_protocol_has_no_sockets_and_no_clock(package: str, banned: set[str]) -> None:
    for path in (ROOT / package).glob("*.py"):
        assert not _imports(ast.parse(path.read_text())) & banned, path


@pytest.mark.parametrize(
    ("start", "not_loaded"),
    [
        (
            "import dlora.edge.__main__ as edge; sys.argv = ['dlora-edge', '--version']; edge.main()",
            {"typer", "numpy", "rich", "psutil", "onnxruntime"},
        ),
        ("import dlora.edge.cli", {"numpy", "rich", "psutil", "onnxruntime", "tokenizers", "websockets", "jinja2"}),
        (
            "import dlora.edge.tokenizer, dlora.edge.data, dlora.edge.connection, dlora.edge.training",
            {"rich", "psutil", "jinja2", "typer"},
        ),
    ],
    ids=["version", "command line", "training on plain text"],
)
def test_what_is_slow_to_load_is_loaded_where_it_is_used(start: str, not_loaded: set[str]) -> None:
    code = f"import sys\n{start}\nloaded = {not_loaded!r} & set(sys.modules)\nassert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")
