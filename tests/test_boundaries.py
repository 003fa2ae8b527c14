"""Who may import whom, where import-linter cannot see it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dlora

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


def test_imports_begin_with_dlora_and_never_with_pickle() -> None:
    # From the repository root `import protocol` works too, and gives other classes than dlora.protocol.
    banned = {*PACKAGES, "pickle", "dill", "cloudpickle", "marshal", "shelve"}
    assert len(SOURCES) > 400
    assert [path for path in SOURCES if _imports(ast.parse(path.read_text())) & banned] == []


def modules_of(package: str) -> list[str]:
    """The full names of a package's modules, at any depth; ``native`` is a program that builds C++."""
    paths = [path.relative_to(ROOT).with_suffix("") for path in sorted((ROOT / package).rglob("*.py"))]
    return [".".join(("dlora", *path.parts)) for path in paths if not {"__init__", "native"} & set(path.parts)]


def test_every_folder_with_modules_is_a_package_that_is_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {path.parent for name in PACKAGES for path in (ROOT / name).rglob("*.py")} - {ROOT / "edge" / "native"}
    assert all((folder / "__init__.py").exists() for folder in folders)
    report = ROOT / "edge" / "report"  # what a page is made of
    folders |= {report / "assets", report / "vendor", report / "vendor" / "uplot"}
    found = {".".join(("dlora", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert sorted(found | {"dlora"}) == sorted(listed)


def test_dlora_says_its_version() -> None:
    assert dlora.__version__ == metadata.version("dlora")
    assert not hasattr(dlora, "no_such_name")


def test_importing_the_whole_edge_leaves_torch_unloaded() -> None:
    modules = modules_of("edge")
    assert len(modules) > 40
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "bad = {'torch', 'transformers', 'peft', 'onnx', 'dlora.cloud', 'dlora.export'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")


def test_the_protocol_has_no_sockets_and_no_clock() -> None:
    for path in (ROOT / "protocol").rglob("*.py"):
        assert not _imports(ast.parse(path.read_text())) & {"asyncio", "websockets", "time", "torch", "socket"}, path


@pytest.mark.parametrize(
    ("start", "not_loaded"),
    [
        ("import dlora.edge.__main__ as edge; sys.argv = ['dlora-edge', '--version']; edge.main()",
         {"typer", "numpy", "rich", "psutil", "onnxruntime"}),
        ("import dlora.edge.commands.app",
         {"numpy", "rich", "psutil", "onnxruntime", "tokenizers", "websockets", "jinja2"}),
        ("import dlora.edge.data.tokenizer, dlora.edge.data.examples, dlora.edge.run.run",
         {"rich", "psutil", "jinja2", "typer"}),
        ("import dlora.export.cli, dlora.export.settings, dlora.cloud.commands.serve, dlora.cloud.model.source",
         {"torch", "transformers", "onnx", "onnxruntime", "executorch", "prometheus_client"}),
    ],
    ids=["version", "command line", "training on plain text", "checks of serve and export"],
)  # fmt: skip
def test_what_is_slow_to_load_is_loaded_where_it_is_used(start: str, not_loaded: set[str]) -> None:
    code = f"import sys\n{start}\nloaded = {not_loaded!r} & set(sys.modules)\nassert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests")
