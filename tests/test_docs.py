"""The docs say what the code does: messages, codes, options, schema, states, numbers and links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import typer.main
from block_bundles import graphs_of, prepared

import dlora.cloud.commands.app
import dlora.edge.commands.app
import dlora.export.cli
from dlora.cloud.admission.guard import ConnectionLimits
from dlora.cloud.serving.timeouts import SessionTimeouts
from dlora.edge.engine.onnx_check import OPERATORS
from dlora.export.graphs import registry
from dlora.export.graphs.adamw import adamw_graph
from dlora.export.graphs.core import core_graphs
from dlora.export.graphs.embedding import embedding_graph
from dlora.export.graphs.head import HeadShape, head_graphs
from dlora.export.graphs.lora import adapter_graphs
from dlora.protocol import adapter_record, errors, frames, kill_revive, link, manifest, messages, session, tensors
from dlora.protocol.adapters import AdapterSpec, crossings
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.traffic import Traffic, micro_batch_traffic, report_traffic
from dlora.protocol.usage_words import FORMER
from dlora.protocol.version import ADAPTER_FORMAT
from dlora.protocol.wire_codecs import Codecs

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")])
LOG = {ROOT / "docs/log/experiments.md", *(ROOT / "docs/log/decisions").glob("0*.md")}
"""What was once: commands, options and files have the names of their day."""
PROTOCOL = (ROOT / "docs/reference/protocol.md").read_text()
BUNDLE = (ROOT / "docs/reference/bundle.md").read_text()
ADAPTERS = (ROOT / "docs/how-to/adapters.md").read_text()
OPERATING = (ROOT / "docs/how-to/run-a-server.md").read_text()
SOURCES = [
    path
    for name in ("protocol", "edge", "cloud", "export")
    for path in sorted((ROOT / name).rglob("*.py"))
    if path.parent.name != "native"  # a program of its own, which builds C++
]
OTHER_PROGRAMS = {
    "--group", "--index-url", "--import-mode", "--strict",  # of pip, pytest and mypy
    "--now",  # of systemctl
    "--logdir",  # of tensorboard
    "--branch", "--recurse-submodules", "--build", "--target", "--whole-archive",  # of git, cmake and ld
    "--no-deps", "--wheel-dir",  # of pip
    "--appendonly", "--appendfsync",  # of valkey-server
    "--build-arg", "--cap-drop", "--format", "--health-cmd", "--name", "--read-only", "--rm", "--secret",  # of podman
    "--tmpfs",  # of podman too
    "--from-file", "--home-dir", "--shell", "--system",  # of kubectl, pip and useradd
}  # fmt: skip
PROGRAMS = {
    "dlora-edge": typer.main.get_command(dlora.edge.commands.app.app),
    "dlora-cloud": typer.main.get_command(dlora.cloud.commands.app.app),
    "dlora-export": typer.main.get_command(dlora.export.cli.app),
    "dlora-export merge": typer.main.get_command(dlora.export.cli.merge_app),
}
WITH_SUBCOMMANDS = {"dlora-export"}  # it is a command itself


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def section(text: str, heading: str) -> str:
    """The text between a heading, of any level, and the next one."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.M | re.S)
    assert found, f"no section {heading}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of all table rows without their headers, backquotes taken off."""
    found = []
    lines = text.splitlines()
    for number, line in enumerate(lines):
        is_header = number + 1 < len(lines) and re.match(r"\|[-| ]+\|$", lines[number + 1])
        if line.startswith("|") and not is_header and not re.match(r"\|[-| ]+\|$", line):
            found.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return found


def first_cells(text: str) -> list[str]:
    return [row[0] for row in rows(text)]


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}


def all_commands() -> Iterator[tuple[str, Any]]:
    """Each program and, at any depth, its commands; the longest names first."""
    found = list(PROGRAMS.items())
    for name, command in found:
        if name not in WITH_SUBCOMMANDS:
            found += [(f"{name} {word}", sub) for word, sub in getattr(command, "commands", {}).items()]
    yield from sorted(found, key=lambda item: -len(item[0]))


ALL_OPTIONS = set().union(*(options_of(command) for _, command in all_commands()))
SCRIPT_OPTIONS = {
    option
    for folder in ("benchmarks", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
    for option in re.findall(r'add_argument\(\s*"(--[a-z0-9-]+)"', path.read_text())
} | set(re.findall(r"^  (--[a-z-]+) ", (ROOT / "packaging" / "install.sh").read_text(), re.M))
MESSAGES = {kind.__struct_config__.tag: kind for kind in get_args(messages.AnyMessage)}


# -- docs/reference/protocol.md ------------------------------------------------------------------------------------


def test_every_message_and_no_other_has_a_section() -> None:
    body = re.search(r"^## Messages\n(.*?)^## ", PROTOCOL, re.M | re.S)
    assert body
    assert re.findall(r"^### `([a-z_]+)`$", body[1], re.M) == list(MESSAGES)


MANIFEST_TYPES = [
    kind
    for name, kind in vars(manifest).items()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == manifest.__name__
    and not name.startswith("_")
]  # fmt: skip
FIELDS = [
    *((PROTOCOL, tag, kind) for tag, kind in MESSAGES.items()),
    *((PROTOCOL, kind.__name__, kind) for kind in (GroupSpec, TargetSpec, kill_revive.KillReviveConfig)),
    *((BUNDLE, kind.__name__, kind) for kind in MANIFEST_TYPES),
    *((ADAPTERS, kind.__name__, kind) for kind in (adapter_record.AdapterRecord, adapter_record.TrainingRecord)),
]


@pytest.mark.parametrize(("page", "heading", "kind"), FIELDS, ids=[heading for _, heading, _ in FIELDS])
def test_fields_match_the_docs(page: str, heading: str, kind: type[msgspec.Struct]) -> None:
    cells = [cell for row in first_cells(section(page, f"`{heading}`")) for cell in row.split("`, `")]
    assert cells == list(kind.__struct_fields__)


def test_the_adapter_records_format_matches_the_docs() -> None:
    assert f"format {ADAPTER_FORMAT}." in section(ADAPTERS, "The record")


def test_kill_and_revive_defaults_match_the_docs() -> None:
    config = kill_revive.KillReviveConfig()
    for field, type_, *_ in rows(section(PROTOCOL, "`KillReviveConfig`")):
        default = re.split(r"[,;] ", type_)[-1].strip("`")
        value = getattr(config, field)
        said = {"empty": (), "true": True}.get(default, default)
        assert said == value or float(default) == value, field


def test_state_table_matches_the_code() -> None:
    expected = [
        [state.name, str(kind.__struct_config__.tag), sender.name[0], target.name]  # type: ignore[attr-defined]
        for state, transitions in session.TRANSITIONS.items()
        for kind, (sender, target) in transitions.items()
    ]
    assert between("transitions") == expected
    drawn = re.findall(r"^    ([A-Z_]+) --> ([A-Z_]+): ([EC]) ([a-z_]+)$", PROTOCOL, re.M)
    assert [[state, kind, sender, target] for state, target, sender, kind in drawn] == expected


def test_unit_states_and_error_codes_match_the_docs() -> None:
    found = [(int(value), name) for value, name, *_ in rows(section(PROTOCOL, "Unit states"))]
    assert found == [(state.value, state.name) for state in kill_revive.UnitState]
    table = rows(section(PROTOCOL, "Errors"))
    assert [row[0] for row in table] == list(messages.ErrorCode)
    kinds = [errors.DloraError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    known = {kind.exit_code for kind in kinds if kind.__module__ == errors.__name__}
    assert all(int(row[3]) in known for row in table)


def between(mark: str) -> list[list[str]]:
    """The rows of the table between two comments of protocol.md."""
    (table,) = re.findall(rf"<!-- {mark}.*?-->(.*?)<!-- end of ", PROTOCOL, re.S)
    return rows(table)


def test_dtypes_and_limits_match_the_docs() -> None:
    assert first_cells(section(PROTOCOL, "Tensors")) == list(tensors.DTYPES)
    for name, value, _ in rows(section(PROTOCOL, "Limits")):
        modules = [module for module in (frames, link, tensors, messages, kill_revive) if hasattr(module, name)]
        assert modules, name
        assert getattr(modules[0], name) == int(value), name
    limits = vars(ConnectionLimits(sessions=1))
    told = {name: float(value) for name, value, _ in between("limits of cloud/admission/guard.py")}
    assert told == {name: value for name, value in limits.items() if name != "sessions"}


def test_headers_of_a_step_fit_in_one_block() -> None:
    targets = int(re.search(r"checked up to (\d+) target modules", PROTOCOL)[1])  # type: ignore[index]
    descriptor = ["fp16", [2**31 - 1] * 2, -tensors.MAX_EXPONENT]
    for kind, extra in ((messages.GroupDelta, {}), (messages.GroupGrad, {"answer": True})):
        fields = dict.fromkeys(("step", "micro_batch", "group"), 2**32 - 1)
        listed = {"deltas" if kind is messages.GroupDelta else "grads": [descriptor] * targets}
        header = msgspec.msgpack.encode({"type": kind.__struct_config__.tag, **fields, **listed, **extra})
        assert frames.PREFIX_BYTES + len(header) <= frames.HEADER_BLOCK


def test_traffic_example_matches_the_formula() -> None:
    targets = (TargetSpec("q", 576), TargetSpec("v", 192))
    groups = [GroupSpec(block, 576, targets) for block in range(30)]
    assert "`77 + 18·units`" in PROTOCOL
    for row in between("example"):
        active, up, down, trips, per_token = (int(cell.replace(",", "")) for cell in row)
        live = range(30 - active, 30)
        step = micro_batch_traffic(
            crossings(AdapterSpec(), groups), live=live, with_grads=live, answered=live[1:], tokens=512, sequences=4,
            labelled=171, embedding_size=576, hidden_size=576, codecs=Codecs.all("fp16"),
        ) + report_traffic(30, 77 + 18 * 30)  # fmt: skip
        assert step == Traffic(up, down, trips)
        assert per_token == round((up + down) / 512)


# -- docs/reference/bundle.md --------------------------------------------------------------------------------------


def test_manifest_defaults_match_the_docs() -> None:
    for kind in MANIFEST_TYPES:
        defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
        for name, type_, _ in rows(section(BUNDLE, f"`{kind.__name__}`")):
            if said := re.search(r"default (\d+)$", type_):
                assert defaults[name] == int(said[1]), name


def test_graph_signatures_match_the_docs() -> None:
    head = HeadShape(96, 8, "int8", bias=True, logit_scale=2.0, softcap=3.0)
    adapters = [*adapter_graphs(8, 6), *core_graphs(6)]
    graphs = [embedding_graph(96, 8, "fp16", 1.0), *adapters, *head_graphs(head), adamw_graph()]
    table = rows(section(BUNDLE, "Graphs"))
    of_blocks = [row[0] for row in rows(section(BUNDLE, "Blocks of the base model")) if len(row) == 3 and "_" in row[0]]
    assert sorted(row[0] for row in table) == sorted(g.kind for g in graphs)
    assert sorted([*of_blocks, *(row[0] for row in table)]) == sorted(registry.KINDS)
    dims = {"V": 96, "e": 8, "h": 8, "in": 8, "out": 6}
    for kind, inputs, outputs in table:
        graph = next(graph for graph in graphs if graph.kind == kind)
        for cell, specs in ((inputs, graph.inputs), (outputs, graph.outputs)):
            said = re.findall(r"`?(\w+)`? ?(?:int64 )?\(([^)]*)\)", cell)
            shapes = [(name, tuple(dims.get(dim, dim) for dim in re.findall(r"\w+", shape))) for name, shape in said]
            assert shapes == [(spec.name, spec.shape) for spec in specs], kind
            for spec in specs:
                assert (f"{spec.name}` int64" in f"`{cell}") == (spec.dtype == "int64"), (kind, spec.name)


OF_BLOCKS = (
    "block_forward", "block_backward", "last_block_forward", "last_block_backward", "block_decode",
    "answer_block_forward", "answer_block_backward", "first_rows", "last_first_rows",
    "final_norm_forward", "final_norm_backward",
)  # fmt: skip


@pytest.mark.parametrize("kind", OF_BLOCKS)
def test_graphs_of_blocks_match_the_docs(kind: str) -> None:
    """Of llama in int8, whose blocks have tables, row scales and LoRA: each input and output is a named one, with its
    shape, or one of those that the docs have in words, in the docs' order."""
    blocks = prepared("llama", 1, "int8")
    (block,), norm = blocks.blocks, blocks.final_norm
    graph = next(graph for graph in graphs_of(blocks) if graph.kind == kind)
    (row,) = (row for row in rows(section(BUNDLE, "Blocks of the base model")) if row[0] == kind)
    lora = [f"{module}.lora_{half}" for module in block.targets for half in "AB"]
    kept = [f"{module}.{what}" for module in block.targets for what in ("product", "z")]
    weights = [*norm.weights] if kind.startswith("final_norm") else [*block.weights]
    in_words = {
        "tables": [*block.tables], "weights": weights, "LoRA": lora, "kept": kept,
        "gradients": [f"grad.{name}" for name in lora],
    }  # fmt: skip
    for cell, specs in zip(row[1:], (graph.inputs, graph.outputs), strict=True):
        found = {spec.name: spec.shape for spec in specs}
        wanted: list[str] = []
        for name, shape in re.findall(r"`?(\w+)`?(?: int64)?(?: \(([^)]*)\))?(?:, |$)", cell):
            if name in in_words:
                wanted += [each for each in in_words[name] if each in found or name not in ("weights", "kept")]
            else:
                wanted.append(name)
                sizes = {"1": 1, "w": 16, "h": 16, "heads": 2, "d": 4}
                assert found[name] == tuple(sizes.get(size, size) for size in re.findall(r"\w+", shape))
        assert list(found) == wanted
    for name, shape in {spec.name: spec.shape for spec in graph.inputs}.items():
        if name.endswith((".z", ".product", ".lora_A", ".lora_B")):
            places = {"z": 0, "product": 0, "lora_A": 0, "lora_B": 1}
            last = name.rpartition(".")[2]
            sizes = {"positions", "labelled"} if last == "product" and "last_" in kind else {"positions"}
            assert shape[places[last]] in (sizes if last == "product" else {"rank"}), name


def test_operators_match_the_docs() -> None:
    (listed,) = re.findall(r"^is the output of a `Constant`[^\n]*\n\n((?:    [\w ]+\n)+)", BUNDLE, re.M)
    assert listed.split() == sorted(OPERATORS)


# -- options, programs -----------------------------------------------------------------------------------


def shell_lines(text: str) -> Iterator[str]:
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S):
        yield from block.replace("\\\n", " ").splitlines()


def test_options_in_command_lines_exist() -> None:
    for document in set(DOCS) - LOG:
        text = document.read_text()
        for line in shell_lines(text):
            for name, command in all_commands():
                if line.startswith(f"{name} "):
                    assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", line)) <= options_of(command), (document, line)
                    break
            else:
                assert not line.startswith("dlora"), (document, line)
        named = set(re.findall(r"(?<![\w<!-])--[a-z][a-z0-9-]*", text))
        assert named <= ALL_OPTIONS | SCRIPT_OPTIONS | OTHER_PROGRAMS, document


def test_options_beside_a_command_in_prose_exist() -> None:
    for document in set(DOCS) - LOG:
        for line in re.findall(r"`(dlora-(?:edge|cloud|export)(?: [^`]*)?)`", document.read_text()):
            name, command = next(item for item in all_commands() if f"{line} ".startswith(f"{item[0]} "))
            is_group = hasattr(command, "commands") and name not in WITH_SUBCOMMANDS
            assert line == name or not is_group, f"{document}: no such command: {line}"
            assert set(re.findall(r"--[a-z][a-z-]*", line)) <= options_of(command), (document, line)


def test_options_in_error_texts_exist() -> None:
    for path in SOURCES:
        said = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        for text in filter(lambda value: isinstance(value, str), said):
            pips = {"--no-deps"} if "pip install" in text else set()
            known = ALL_OPTIONS | pips | set(FORMER)
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) <= known, (path, text)


def test_server_options_are_documented_with_their_defaults() -> None:
    serve = dict(all_commands())["dlora-cloud serve"]
    wanted = {parameter.opts[0]: parameter.default for parameter in serve.params if parameter.rich_help_panel}
    told = {row[0]: row[1] for row in rows(OPERATING) if row[0].startswith("--")}
    assert list(told) == list(wanted)
    for option, default in wanted.items():
        assert told[option] == (f"{default:g}" if isinstance(default, float) else str(default or "")), option


def test_deadlines_match_the_docs() -> None:
    told = {float(seconds) for seconds in re.findall(r"\| (\d+) s", section(PROTOCOL, "Deadlines"))}
    assert told >= set(vars(SessionTimeouts()).values())


def test_docs_are_short_but_for_the_log() -> None:
    pages = [page for page in DOCS if page.is_relative_to(ROOT / "docs") and not page.is_relative_to(ROOT / "docs/log")]
    assert sum(len(re.findall(r"\S*\w\S*", page.read_text())) for page in pages) <= 45_500


def test_make_targets_in_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))
    for document in DOCS:
        text = document.read_text()
        named = re.findall(r"^ *make ([a-z-]+)", text, re.M) + re.findall(r"`make ([a-z-]+)`", text)
        assert set(named) <= targets, document


# -- links and paths -------------------------------------------------------------------------------------


def anchors(text: str) -> Iterable[str]:
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_resolve() -> None:
    for document in DOCS:
        for address in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
            if address.startswith(("https://", "http://")):
                continue
            path, _, anchor = address.partition("#")
            target = (document.parent / path).resolve() if path else document
            assert target.is_relative_to(ROOT), (document, address)
            assert target.exists(), (document, address)
            if anchor:
                assert anchor in set(anchors(target.read_text())), (document, address)


def test_source_files_named_in_docs_exist() -> None:
    source = r"`((?:protocol|edge|cloud|export|tests|docs)/[\w./-]+\.(?:py|md))`"
    for document in DOCS:
        for path in re.findall(source, document.read_text()):
            assert (ROOT / path).exists(), (document, path)


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs/log/decisions"
    listed = re.findall(r"\((\d{4}-[a-z0-9-]+\.md)\)", (folder / "README.md").read_text())
    assert listed == sorted(path.name for path in folder.glob("0*.md"))
