"""Files of a known structure that are not so: what is wrong with them is said in our words, and not in msgspec's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest
from tiny import TinyFactory

from dlora.edge.data.lines import json_object
from dlora.edge.run.run_file import load_run_file
from dlora.protocol.errors import BundleError, CheckpointError, DataError
from dlora.protocol.manifest import load_manifest
from dlora.protocol.structure_words import structure_words

THEIRS = re.compile(r"Expected|got `|`|\$\.|Object |Invalid |malformed|Input data")


class _Inner(msgspec.Struct, forbid_unknown_fields=True):
    steps: Annotated[int, msgspec.Meta(ge=1)]
    mode: Literal["split", "local"] = "split"
    server: str | None = None
    path: Annotated[str, msgspec.Meta(pattern=r"\A/")] = "/"
    pair: tuple[int, int] = (0, 0)


class _Outer(msgspec.Struct):
    settings: _Inner


@pytest.mark.parametrize(("text", "said"), [
    ('{"settings": {"steps": "s"}}', "settings.steps is a text, and a whole number belongs there"),
    ('{"settings": {}}', "settings: 'steps' is missing"), ('{"settings": {"steps": 1, "k": 1}}', "settings: 'k' is n"),
    ('{"settings": {"steps": 0}}', "settings.steps has a value that cannot be: a whole number >= 1 belongs there"),
    ('{"settings": {"steps": 1, "mode": "c"}}', "settings.mode is 'c', which is not known"),
    ('{"settings": {"steps": 1, "server": 3}}', "settings.server is a whole number, and a text or nothing"),
    ('{"settings": {"steps": 1, "path": "x"}}', "settings.path has a value that cannot be: a text belongs there"),
    ('{"settings": {"steps": 1, "pair": [1]}}', "settings.pair has a value that cannot be: a list of length 2 belongs"),
    ("{", "it is cut short"), ("{a}", "it is no JSON: object keys must be strings"), ("[]", "it is a list, and"),
])  # fmt: skip
def test_words(text: str, said: str) -> None:
    with pytest.raises(msgspec.MsgspecError) as caught:
        msgspec.json.decode(text, type=_Outer)
    words = structure_words(caught.value)
    assert words.startswith(said)
    assert not THEIRS.search(words)


def test_what_is_no_error_of_structure_is_as_it_is() -> None:
    assert structure_words(OSError("disk")) == "disk"


@pytest.mark.parametrize("change", [
    lambda it: it.update(groups=1), lambda it: it["base_model"].pop("blocks"), lambda it: it["head"].update(dtype=1),
], ids=["type", "missing", "word"])  # fmt: skip
def test_a_manifest(tiny: TinyFactory, tmp_path: Path, change: Callable[[Any], object]) -> None:
    manifest = json.loads((tiny().bundle / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"damaged \(.*\); export the bundle again") as caught:
        load_manifest(tmp_path)
    assert not THEIRS.search(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": {}}', '{"settings": 3}'])
def test_a_runs_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be read \(.*\); repeat the run's options") as caught:
        load_run_file(tmp_path)
    assert not THEIRS.search(str(caught.value)), str(caught.value)


@pytest.mark.parametrize("row", ["{", '{"a": }', "{a: 1}"])
def test_a_row_of_data(row: str) -> None:
    with pytest.raises(DataError, match=r"^f:3: not valid JSON \(.*\); one object") as caught:
        json_object(row, "f:3", "one object a line")
    assert not THEIRS.search(str(caught.value)), str(caught.value)
