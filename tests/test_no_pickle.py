"""Nothing that we run can turn data into code: a walk over the syntax tree of every module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]
FOLDERS: Final = ("protocol", "cloud", "edge", "export", "benchmarks", "examples")
SOURCES: Final = {str(path.relative_to(ROOT)): path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))}

# Modules that run what a file or a peer says. multiprocessing's connections and queues are pickle underneath.
MODULES: Final = {
    "pickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "jsonpickle", "multiprocessing",
}  # fmt: skip
# Not even to be mentioned: `map(eval, …)` calls it as well.
NAMES: Final = {
    "eval", "exec", "compile", "__import__",
    "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell",
    "shutil.unpack_archive", "pandas.read_pickle",
}  # fmt: skip
METHODS: Final = {"extractall"}
SAFE_YAML: Final = {"yaml.safe_load", "yaml.safe_load_all", "yaml.safe_dump", "yaml.YAMLError"}
# Keywords that may only be written with this value, whatever is called.
KEYWORDS: Final = {"allow_pickle": False, "shell": False, "trust_remote_code": False, "weights_only": True}


class Walker(ast.NodeVisitor):
    """Collects what is forbidden, as ``line: what``; sees through ``import … as``."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._meaning: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._meet_module(node, alias.name)
            self._meaning[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or node.module is None:
            return
        self._meet_module(node, node.module)
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            self._meaning[alias.asname or alias.name] = whole
            self._meet_name(node, whole)

    def visit_Call(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            if keyword.arg in KEYWORDS and not _is(keyword.value, KEYWORDS[keyword.arg]):
                self._forbid(node, f"{keyword.arg} that is not {KEYWORDS[keyword.arg]}")
        if self._whole_name(node.func) == "torch.load":
            if not any(keyword.arg == "weights_only" for keyword in node.keywords):
                self._forbid(node, "torch.load without weights_only=True")
            # Its name is done with: what is left to be found are mentions that are no calls.
            for child in (*node.args, *node.keywords):
                self.visit(child)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in METHODS:
            self._forbid(node, node.attr)
        self._meet_name(node, self._whole_name(node))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):  # a field may be called eval
            self._meet_name(node, self._whole_name(node))

    def _meet_module(self, node: ast.AST, name: str) -> None:
        if name.split(".")[0] in MODULES:
            self._forbid(node, f"import of {name}")

    def _meet_name(self, node: ast.AST, name: str | None) -> None:
        if name is None:
            return
        name = name.removeprefix("builtins.")
        torch_load = name == "torch.load" and not isinstance(node, ast.ImportFrom)
        unsafe_yaml = name.startswith("yaml.") and name not in SAFE_YAML
        if name in NAMES or torch_load or unsafe_yaml:
            self._forbid(node, name)

    def _whole_name(self, node: ast.AST) -> str | None:
        """``np.load`` to ``numpy.load``, by the imports; None for what is no plain name."""
        if isinstance(node, ast.Name):
            return self._meaning.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self._whole_name(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return None

    def _forbid(self, node: ast.AST, what: str) -> None:
        self.found.append(f"{getattr(node, 'lineno', 0)}: {what}")


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def forbidden(source: str) -> list[str]:
    """What a module does that it must not."""
    tree = ast.parse(source)
    walker = Walker()
    # Imports first: a function may use what is imported further down.
    for node in _imports(tree):
        walker.visit(node)
    walker.found.clear()
    walker.visit(tree)
    return walker.found


def _imports(tree: ast.AST) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))


def test_no_module_turns_data_into_code() -> None:
    found = {name: forbidden(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
    assert {name: said for name, said in found.items() if said} == {}


def test_check_covers_every_folder() -> None:
    assert {name.partition("/")[0] for name in SOURCES} >= set(FOLDERS)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "def f():\n    import _pickle",
        "import marshal, json",
        "import shelve",
        "import dill",
        "from joblib import load",
        "from cloudpickle.cloudpickle import loads",
        "from multiprocessing.connection import Client",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=chosen)",
        "import torch as t\nt.load(path)",
        "from torch import load as read\nread(path)",
        "import torch\nread = torch.load",
        "import torch\ntorch.hub.load(repo)",
        "import torch\ntorch.jit.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "from numpy.lib.format import read_array\nread_array(file, allow_pickle=wanted)",
        "eval(text)",
        "exec(text)",
        "compile(text, name, 'exec')",
        "__import__(name)",
        "list(map(eval, texts))",
        "import builtins\nbuiltins.exec(text)",
        "from builtins import eval as run\nrun(text)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "import yaml\nyaml.full_load(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess as s\ns.Popen(text, shell=wanted)",
        "import subprocess\nsubprocess.getoutput(text)",
        "import os\nos.system(text)",
        "from os import popen",
        "import asyncio\nasyncio.create_subprocess_shell(text)",
        "import tarfile\ntarfile.open(path).extractall(out)",
        "import zipfile\nwith zipfile.ZipFile(path) as z:\n    z.extractall(out)",
        "import shutil\nshutil.unpack_archive(path)",
        "from transformers import AutoModel\nAutoModel.from_pretrained(name, trust_remote_code=True)",
        "def f():\n    t.load(path)\nimport torch as t",
    ],
)
def test_check_finds_forbidden_code(source: str) -> None:
    assert forbidden(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile('x')",
        "from re import compile\ncompile('x')",
        "model.eval()",
        "import torch\ntorch.compile(model)",
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)",
        "import numpy as np\nnp.load(path)",
        "import yaml\nyaml.safe_load(text)",
        "import subprocess\nsubprocess.run(['ls'], check=True)",
        "import json\njson.load(file)",
        "engine.load('adamw')",
        "from .pickle import jar",
        "'import pickle; eval(text)'",
    ],
)
def test_check_accepts_allowed_code(source: str) -> None:
    assert forbidden(source) == []
