"""``dlora-cloud audit``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlora.cloud.model.source import find_source
from dlora.protocol.errors import StorageError, UsageError

from .torch_start import start_torch

if TYPE_CHECKING:  # torch is loaded when an audit starts
    from dlora.cloud.audit.audit import Audit
    from dlora.cloud.audit.tokenizer import TruthTokenizer
    from dlora.protocol.recording import Recording

_COLOURS = {"EXPOSED": "bold red", "PARTIAL": "yellow", "RESISTED": "blue", "BY CONSTRUCTION": "green"}


def audit(
    model: Annotated[str, typer.Argument(help="The base model that the server ran, as for serve.")],
    frames: Annotated[Path, typer.Option(help="DIR/frames of a dlora-edge --record DIR.")],
    truth: Annotated[Path, typer.Option(help="DIR/truth of the same: what attacks are scored against.")],
    out: Annotated[Path, typer.Option(help="The page; the JSON is written beside it.")] = Path("audit.html"),
    phrase: Annotated[
        list[str] | None,
        typer.Option(
            "--phrase",
            metavar="TEXT",
            help="Words to look for in the text that is found, such as some that you put into the data for it. May be "
            "given several times.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="Torch threads; 0: one for each core.", min=0, max=1024)] = 0,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Attack what really crossed, as a curious server could, and say what it recovers.

    A device records a short run with dlora-edge train, evaluate or generate --record DIR. The attackers see the frames
    and the base weights only; the truth, which never crossed, says how right they are. Of text, labels, adapter,
    gradients, lengths, membership and seed it says EXPOSED, PARTIAL, RESISTED or BY CONSTRUCTION, with the figure
    and the attack that won. A verdict holds for this recording.

    Example:  dlora-cloud audit smollm2-135m --frames rec/frames --truth rec/truth --out audit.html
    """
    json_path = out.with_suffix(".json")
    _check_out(out, json_path)
    if phrase and not all(each.strip() for each in phrase):
        raise UsageError("--phrase is empty; write some words")
    find_source(model)
    from dlora.protocol.recording import read_recording

    recording = read_recording(frames)  # before torch is loaded, so that what is wrong is said at once
    from dlora.cloud.audit.tokenizer import truth_tokenizer

    with truth_tokenizer(truth) as tokenizer:
        if phrase and tokenizer is None:
            raise UsageError("--phrase needs the truth's tokenizer.json, which is not there; record again")
        result = _attack(model, recording, truth, tokenizer, phrase or (), threads)
    from dlora.cloud.audit.page import page

    _write(out, page(result).encode())
    encoded = to_json(result)
    _write(json_path, encoded)
    if json_output:
        sys.stdout.buffer.write(encoded)
    else:
        show(result)
        print(f"the texts beside each other, and all attacks: {out}; as JSON: {json_path}")


def _attack(
    model: str,
    recording: Recording,
    truth: Path,
    tokenizer: TruthTokenizer | None,
    phrases: Sequence[str],
    threads: int,
) -> Audit:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    errors = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("reading frames", total=None)
        start_torch("cpu", threads)
        from dlora.cloud.audit.audit import run_audit
        from dlora.cloud.audit.observed import observe
        from dlora.cloud.audit.truth import load_truth
        from dlora.cloud.model.base_model import load_base_model

        seen = observe(recording)
        true = load_truth(truth, recording.id, seen, tokenizer)
        progress.update(task, description=f"loading {model}")

        def tell(line: str) -> None:
            progress.console.print(line, markup=False, highlight=False)

        base = load_base_model(model, say=tell, weight_format=seen.welcome.base_weight_format)

        def on_attack(what: str) -> None:
            progress.update(task, description=f"attacking: {what}")

        return run_audit(seen, true, base, phrases=list(dict.fromkeys(phrases)), on_attack=on_attack)


def to_json(result: Audit) -> bytes:
    """What ``--json`` prints, and the file beside the page."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def show(result: Audit) -> None:
    """Print the findings for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_edge=False, pad_edge=False)
    for column in ("secret", "verdict", "found", "attack"):
        table.add_column(column)
    for finding in result.findings:
        verdict, best = finding.verdict or "nothing there", finding.best
        table.add_row(
            Text(finding.secret),
            Text(verdict, style=_COLOURS.get(verdict, "")),
            Text(best.found if best else finding.why.split("; ")[0]),
            Text(best.name if best else ""),
        )
    console = Console()
    console.print(table)
    for line in result.clear:
        console.print(f"in the clear: {line}", markup=False, highlight=False, soft_wrap=True)


def _check_out(out: Path, json_path: Path) -> None:
    """Raise ``UsageError`` where the page or the JSON would replace something else."""
    if out.suffix != ".html" or out.is_dir() or not out.parent.is_dir():
        raise UsageError(f"--out {out}: name a file that ends in .html, in a directory that exists")
    if not os.access(out.parent, os.W_OK):
        raise StorageError(f"cannot write into {out.parent}; choose another --out")
    if json_path.exists() and b'"base_fingerprint"' not in json_path.read_bytes()[:1000]:
        raise UsageError(f"--out {out} would replace {json_path}, which is no audit; choose another name")


def _write(path: Path, content: bytes) -> None:
    """Only its owner may read it: it has the text that was recovered, and the true one."""
    try:
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another --out") from None
