"""``dlora-edge data``: what exactly would be learnt of some data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dlora.edge.settings import Settings
from dlora.protocol.text import visible

from .options import JsonOption
from .output import escaped, print_result
from .settings_options import takes_settings

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN_TOKENS: Final = 240  # of a row; the middle of a longer one is left out
_BAR: Final = 40  # characters


@takes_settings(
    "bundle", "eval", "hold_out", "train_on", "columns", "max_length", "too_long",
    required=("bundle",),
    changes={
        "eval": {"help": "Held-out data: how many rows of FILE are in them."},
        "hold_out": {
            "default": "", "help": "Hold this share out, or auto, as train does it; with --out, into files.",
        },
    },
)  # fmt: skip
def data(
    settings: Settings,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Data as for train: a file, or a directory of them.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory for the parts of --hold-out: train.jsonl and held-out.jsonl.")
    ] = None,
    show: Annotated[int, typer.Option(help="How many rows to show, the first ones.", min=0)] = 3,
    line: Annotated[
        list[int] | None, typer.Option(help="Show the row that begins at this line; may be given again.", min=1)
    ] = None,
    json_output: JsonOption = False,
) -> None:
    """What exactly will be learnt: rows as tokens with the learnt ones in colour, counts, lengths, doubles, problems.

    Nothing leaves this device, and no server is asked. In a terminal, what is learnt is green; elsewhere it stands in
    ⟦ ⟧, with a | between tokens. Rows that train would refuse are listed, and the exit code is then that of train.

    Example:  dlora-edge data chat.jsonl --bundle build/smollm2
    """
    from dlora.edge.data.loading import load_overview
    from dlora.edge.data.read_settings import Look, read_settings
    from dlora.edge.engine.bundle import Bundle
    from dlora.edge.run.display import Display
    from dlora.protocol.errors import DataError, UsageError

    share = settings.data.hold_out
    if out is not None and not share:
        raise UsageError("--out needs --hold-out, the share to hold out")
    if share and settings.data.eval is not None:
        raise UsageError("--hold-out makes held-out data, and --eval names some: leave one of them out")
    assert settings.device.bundle is not None  # the decorator asks for it
    opened = Bundle.open(settings.device.bundle, verify=settings.device.verify)
    display = Display(json_output=json_output)
    with display.reading() as on_tick:
        look = Look(settings.data.eval, out, show, line or ())
        found = load_overview(opened, file, read_settings(settings.data, opened.manifest), look, on_tick)
    print_result(found, lambda result: _show(result, file, settings.data.train_on, out), json_output=json_output)
    if line and not found["shown"]:
        raise DataError(f"{file}: no row that can be learnt from begins at line {', '.join(map(str, line))}")
    if count := found["problems"]["count"]:
        first = found["reasons"][0]
        raise DataError(first if count == 1 else f"{count:,} rows cannot be learnt from; the first: {first}")
    if not found["examples"]:
        raise DataError(f"{file}: no examples in it")


def _show(found: dict[str, Any], file: Path, train_on: str, out: Path | None) -> None:
    """Print an overview for people."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for row in found["shown"]:
        console.print(f"[bold]{escaped(row['place'])}[/]")
        _show_row(console, row)
        console.print()
    what = "text" if found["form"] == "documents" else "row"
    rows = f"{found['rows']:,} {what}{'' if found['rows'] == 1 else 's'}"
    console.print(f"[bold]{escaped(str(file))}[/]  {found['form'] or 'nothing'}, {rows}")
    learnt = {
        "all": "every token", "last": "the last answer", "answers": "answers",
    }[train_on]  # fmt: skip
    if found["form"] in ("text", "documents"):
        learnt = "every token"
    marks = ", as the chat template marks them" if found["has_marks"] and learnt != "every token" else ""
    share = found["labelled"] / max(1, found["tokens"])
    lines = [
        ("learnt", f"{learnt}{marks}: {found['labelled']:,} of {found['tokens']:,} tokens ({share:.0%})"),
        ("examples", f"{found['examples']:,}" + (f", {found['held_out']:,} held out" if found["held_out"] else "")),
    ]
    if found["examples"]:
        least, median, most_of_them, most = found["lengths"]
        middle = f"half of them up to {median:,}, 95 % up to {most_of_them:,}"
        lines.append(("tokens each", f"{least:,} to {most:,}, {middle}"))
    for name, what in (
        ("duplicates", "the same as a row before"),
        ("in_held_out", "the same as a row held out, which makes the held-out loss look better than it is"),
        ("empty_answers", "with an empty answer"),
        ("wordless_answers", "with an answer without a letter or digit"),
        ("calls_left_out", "with calls of tools that the chat template leaves out: these are not learnt"),
        ("truncated", f"cut to {found['max_length']:,} tokens"),
        ("skipped", f"left out: more than {found['max_length']:,} tokens, or all of the answer after them"),
        ("problems", "refused by train"),
    ):
        places = found[name]
        if not places["count"]:
            continue
        first = [text.split(": ", 1)[0] for text in places["first"]] if name == "problems" else places["first"]
        more = ", …" if places["count"] > len(first) else ""
        lines.append((name.replace("_", " "), f"{places['count']:,} {what} ({', '.join(first)}{more})"))
    for name, text in lines:
        console.print(f"  {name:<17} {escaped(text)}")
    for reason in found["reasons"]:
        console.print(f"    [red]{escaped(reason)}[/]")
    if len(found["histogram"]) > 1:
        _show_lengths(console, found)
    if out is not None and found["held_out"]:
        console.print(f"written: {escaped(str(out / 'train.jsonl'))} and {escaped(str(out / 'held-out.jsonl'))}")


def _show_lengths(console: Console, found: dict[str, Any]) -> None:
    most = max(bar["examples"] for bar in found["histogram"])
    console.print("  tokens, and how many examples have so many:")
    bars = found["histogram"]
    first = next(number for number, bar in enumerate(bars) if bar["examples"])
    for bar in bars[max(0, first - 1) :]:
        length = _BAR * bar["examples"] / most
        filled = "█" * int(length) + ("▌" if length % 1 >= 0.5 else "")
        over = "  over --max-length" if bar["up_to"] > found["max_length"] and bar["examples"] else ""
        console.print(f"  {bar['up_to']:>9,} {filled or ('▏' if bar['examples'] else '')} {bar['examples']:,}{over}")


def _show_row(console: Console, row: dict[str, Any]) -> None:
    texts = [visible(text).replace("\t", "⇥") for text in row["tokens"]]
    tokens = [*zip(texts, row["learnt"], strict=True)]
    if len(tokens) > _SHOWN_TOKENS:
        half, left_out = _SHOWN_TOKENS // 2, len(tokens) - _SHOWN_TOKENS
        tokens = [*tokens[:half], (f" … {left_out:,} tokens … ", False), *tokens[-half:]]
    if console.is_terminal:
        _show_coloured(console, tokens)
        return
    pieces, was_learnt = list[str](), False
    for number, (text, learnt) in enumerate(tokens):
        if learnt != was_learnt:
            pieces.append("⟦" if learnt else "⟧")
        elif number:
            pieces.append("|")
        pieces.append(text)
        was_learnt = learnt
    print("".join(pieces) + ("⟧" if was_learnt else ""))


def _show_coloured(console: Console, tokens: list[tuple[str, bool]]) -> None:
    """Learnt tokens are green; every other one has a line below it, so that one sees where they end."""
    from rich.text import Text

    shades = {True: ("bold green", "bold underline green"), False: ("dim", "dim underline")}
    text = Text()
    for number, (piece, learnt) in enumerate(tokens):
        text.append(piece.replace("\n", "⏎\n"), style=shades[learnt][number % 2])
    console.print(text)
