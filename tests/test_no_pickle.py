"""Nothing that we run can turn data into code: a walk over the syntax tree of every module."""

from __future__ import annotations

import ast
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


def forbidden(source: str) -> list[str]:
    """What a module does that it must not, as ``line: what``; sees through ``import … as``."""
    tree = ast.parse(source)
    found: list[tuple[int, str]] = []
    meaning: dict[str, str] = {}
    for node in ast.walk(tree):  # imports first: a function may use what is imported further down
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
            meaning |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            modules = [node.module]
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [(node.lineno, name) for name in names.values() if is_forbidden(name) and name != "torch.load"]
            meaning |= names
        found += [(node.lineno, f"import of {name}") for name in modules if name.partition(".")[0] in MODULES]

    def whole_name(node: ast.AST) -> str:
        """``np.load`` to ``numpy.load``, by the imports; empty for what is no plain name."""
        if isinstance(node, ast.Name):
            return meaning.get(node.id, node.id)
        base = whole_name(node.value) if isinstance(node, ast.Attribute) else ""
        return f"{base}.{node.attr}" if base and isinstance(node, ast.Attribute) else ""

    safe_loads = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg in KEYWORDS}
            wrong = [name for name, value in given.items() if getattr(value, "value", None) is not KEYWORDS[name]]
            found += [(node.lineno, f"{name} that is not {KEYWORDS[name]}") for name in wrong]
            if "weights_only" in given:
                safe_loads.add(node.func)
        elif isinstance(node, ast.Attribute) and node.attr in METHODS:
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)):
            name = whole_name(node)  # a field may be called eval, which is no load
            if is_forbidden(name) and not (name == "torch.load" and node in safe_loads):
                found.append((node.lineno, name))
    return [f"{line}: {what}" for line, what in found]


def is_forbidden(name: str) -> bool:
    name = name.removeprefix("builtins.")
    unsafe_yaml = name.startswith("yaml.") and name not in SAFE_YAML
    return name in NAMES or name == "torch.load" or unsafe_yaml


def test_no_module_turns_data_into_code() -> None:
    found = {name: forbidden(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
    assert {name: said for name, said in found.items() if said} == {}
    assert {name.partition("/")[0] for name in SOURCES} >= set(FOLDERS)


BAD: Final = (
    "import pickle", "import pickle as p", "from pickle import loads", "def f():\n    import _pickle",
    "import marshal, json", "import shelve", "import dill", "from joblib import load",
    "from cloudpickle.cloudpickle import loads", "from multiprocessing.connection import Client",
    "import torch\ntorch.load(path)", "import torch\ntorch.load(path, weights_only=False)",
    "import torch\ntorch.load(path, weights_only=chosen)", "import torch as t\nt.load(path)",
    "from torch import load as read\nread(path)", "import torch\nread = torch.load",
    "import torch\ntorch.hub.load(repo)", "import torch\ntorch.jit.load(path)",
    "import numpy as np\nnp.load(path, allow_pickle=True)",
    "from numpy.lib.format import read_array\nread_array(file, allow_pickle=wanted)",
    "eval(text)", "exec(text)", "compile(text, name, 'exec')", "__import__(name)", "list(map(eval, texts))",
    "import builtins\nbuiltins.exec(text)", "from builtins import eval as run\nrun(text)",
    "import yaml\nyaml.load(text)", "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
    "from yaml import unsafe_load", "import yaml\nyaml.full_load(text)",
    "import subprocess\nsubprocess.run(text, shell=True)", "import subprocess as s\ns.Popen(text, shell=wanted)",
    "import subprocess\nsubprocess.getoutput(text)", "import os\nos.system(text)", "from os import popen",
    "import asyncio\nasyncio.create_subprocess_shell(text)", "import tarfile\ntarfile.open(path).extractall(out)",
    "import zipfile\nwith zipfile.ZipFile(path) as z:\n    z.extractall(out)",
    "import shutil\nshutil.unpack_archive(path)",
    "from transformers import AutoModel\nAutoModel.from_pretrained(name, trust_remote_code=True)",
    "def f():\n    t.load(path)\nimport torch as t",
)  # fmt: skip
GOOD: Final = (
    "import re\nre.compile('x')", "from re import compile\ncompile('x')", "model.eval()",
    "import torch\ntorch.compile(model)", "import torch\ntorch.load(path, weights_only=True)",
    "import numpy as np\nnp.load(path, mmap_mode='r', allow_pickle=False)", "import numpy as np\nnp.load(path)",
    "import yaml\nyaml.safe_load(text)", "import subprocess\nsubprocess.run(['ls'], check=True)",
    "import json\njson.load(file)", "engine.load('adamw')", "from .pickle import jar", "'import pickle; eval(text)'",
)  # fmt: skip


@pytest.mark.parametrize("source", BAD)
def test_check_finds_forbidden_code(source: str) -> None:
    assert forbidden(source)


@pytest.mark.parametrize("source", GOOD)
def test_check_accepts_allowed_code(source: str) -> None:
    assert forbidden(source) == []
