"""The how-to about a folder of notes: its three commands, as they stand there, with a tiny model; few notes do, too."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from processes import BIN, END_TIMEOUT_S, quiet_environment
from serving import serving
from tiny import TinyFactory

ROOT = Path(__file__).parents[1]
SH = re.compile(r"```sh\n(.*?)```", re.S)


@pytest.mark.parametrize("count", [40, 8])
def test_a_folder_of_notes_becomes_an_adapter_that_is_better_than_the_base(
    tiny: TinyFactory, tmp_path: Path, count: int
) -> None:
    # Larger weights than a new model has: learning rates mean a share of what a module gives.
    model = tiny("llama", max_position_embeddings=512, initializer_range=0.5)
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(count):
        (notes / f"{number}.md").write_text(f"# w{number}\n\n" + "w3 w1 w4 w1 w5 w9 w2 w6 " * 6)
    how_to = (ROOT / "docs/how-to/notes.md").read_text()
    commands = [line for block in SH.findall(how_to) for line in block.splitlines()]
    assert [line.split()[1] for line in commands] == ["data", "train", "evaluate"]
    outputs = []
    with serving(model.base) as server:
        for line in commands:
            command = line.replace("ws://127.0.0.1:8765", server.url).replace("build/smollm2", str(model.bundle))
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=4 * END_TIMEOUT_S,
                env={**quiet_environment(), "PATH": f"{BIN}:/usr/bin:/bin"}, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
    assert f"documents, {count} texts" in outputs[0]
    found = tmp_path / "my-notes"
    assert (found / "adapter_model.safetensors").exists()
    assert "my-notes: a run of dlora" in (found / "report.html").read_text()
    evaluations = [json.loads(row) for row in (found / "evaluations.jsonl").read_text().splitlines()]
    assert min(row["loss"] for row in evaluations) < evaluations[0]["loss"] - 0.1
    assert "my-notes is " in outputs[2]
    assert re.search(r"my-notes is \d+\.\d+ lower \(\d", outputs[2]), outputs[2]
