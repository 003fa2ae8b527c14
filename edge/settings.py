"""The settings of a run: one structure a concern, each field once.

A field is an option of ``dlora-edge train``, a key of run.toml and of run.json, an environment variable, a row of the
reference, and a keyword of ``TrainingClient``. Its limits and its help are in its ``Meta``; its depth says where it is
shown: ``BASIC`` in ``--help``, ``MORE`` in ``--help-all``, and what is set once in a life (``RARE``) only by
``--set section.key=value`` or in the file.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from dlora.protocol.choices import ActiveFrom, Basis, KindChoice, OnKill, ScoreName, Send, UnitKind
from dlora.protocol.errors import UsageError
from dlora.protocol.kill_revive import Fraction
from dlora.protocol.limits import MAX_RANK, MAX_STEPS, MAX_THREADS
from dlora.protocol.structure_words import structure_words

from .choices import EngineChoice, Keep, OnWorse, ScheduleName, TooLong, TrainOn

VARIABLE: Final = "DLORA_EDGE_"
_LIMITS: Final = ("ge", "gt", "le", "lt", "pattern")

Depth = Literal["basic", "more", "rare"]
Count = Annotated[int, Meta(ge=1, le=MAX_STEPS)]
Whole = Annotated[int, Meta(ge=0, le=MAX_STEPS)]
Amount = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Rank = Annotated[int, Meta(ge=1, le=MAX_RANK)]
SecretPath = Annotated[Path, Meta(extra={"secret": True})]
"""A file with a secret in it: a page says that there is one, and no more."""


def _meta(depth: Depth, text: str, **about: Any) -> Meta:
    """``about``: ``option``, its name on the command line where that is not the field's; ``metavar``; and
    ``makes_bits``, whether it changes what a run trains, so that a checkpoint goes on only with the same."""
    return Meta(description=text, extra={"depth": depth, **about})


basic = partial(_meta, "basic")  # of a field that --help shows
more = partial(_meta, "more")  # of one that only --help-all shows
rare = partial(_meta, "rare")  # of one without an option


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Some fields. The first line of a section's docstring is the name of its panel in ``--help``."""


class Device(Section, frozen=True, kw_only=True):
    """This device"""

    bundle: Annotated[Path | None, basic("Bundle directory, from dlora-export.")] = None
    verify: Annotated[
        bool,
        more(
            "Read the whole bundle and check its digests, also of large files that had the right ones before and have "
            "not changed since."
        ),
    ] = False
    engine: Annotated[
        EngineChoice,
        more(
            "What runs the graphs: onnx, executorch or auto, which is ONNX Runtime, or else what there is.",
            metavar="ENGINE",
        ),
    ] = "auto"
    threads: Annotated[Annotated[int, Meta(ge=0, le=MAX_THREADS)], more("Compute threads; 0: one for each core.")] = 0
    pause_when: Annotated[
        tuple[str, ...],
        more(
            "Pause between steps while one of these holds, and go on by itself: battery<PERCENT, temperature>CELSIUS, "
            "memory<SIZE (200MB, 2GB), metered. Several with commas, or the option again; quote it, < and > mean "
            "something to the shell.",
            metavar="RULES",
        ),
    ] = ()


class Data(Section, frozen=True, kw_only=True):
    """Data"""

    data: Annotated[
        Path | None,
        basic(
            "Training data: a .jsonl, .json, .csv, .tsv, .parquet, .txt or .md file, or a directory of them. "
            "dlora-edge data shows what is learnt of it."
        ),
    ] = None
    eval: Annotated[Path | None, basic("Data to evaluate on; without it --hold-out keeps some of --data for that.")] = (
        None
    )
    hold_out: Annotated[
        str,
        basic(
            "Share of the rows that is held out, where there is no --eval; 0: none. auto: a tenth, at most 200, and "
            "none of fewer than 20.",
            metavar="SHARE",
        ),
    ] = "auto"
    train_on: Annotated[
        TrainOn,
        more(
            "Which tokens are learnt: answers, those of the assistant's turns or of the completion; all, prompts too; "
            "last, those of the last answer.",
            metavar="WHAT",
        ),
    ] = "answers"
    columns: Annotated[
        str | None, more("Columns of a table: prompt=COLUMN,completion=COLUMN, text=COLUMN or messages=COLUMN.")
    ] = None
    max_length: Annotated[
        Annotated[int, Meta(ge=2, le=MAX_STEPS)] | None,
        basic("Longest example, in tokens; 512 by default, or what the model takes."),
    ] = None
    too_long: Annotated[
        TooLong, more("Examples over --max-length: error, truncate or skip them.", metavar="ACTION")
    ] = "error"


class Adapter(Section, frozen=True, kw_only=True):
    """Adapters"""

    kind: Annotated[
        KindChoice | None,
        basic(
            "bottleneck: a small core here, between a frozen A and B on the server: little traffic. lora: A and B "
            "here. ffa: B here, a frozen A on the server. By default bottleneck, or what --init-adapter is.",
            metavar="KIND",
            makes_bits=True,
        ),
    ] = None
    rank: Annotated[Rank | None, basic("By default the bundle's; 96 for a bottleneck.", makes_bits=True)] = None
    alpha: Annotated[Positive | None, more("By default the bundle's; the rank for a bottleneck.", makes_bits=True)] = (
        None
    )
    target_modules: Annotated[
        str | None,
        basic(
            "What gets adapters: names, separated by commas, or all-linear. By default the bundle's; all-linear for a "
            "bottleneck.",
            makes_bits=True,
        ),
    ] = None
    blocks: Annotated[
        str,
        basic(
            "Adapters in these blocks only: 0,3,26-29; spread:8, eight over the upper half; last:4; or all. By default "
            "all; spread:8 for a bottleneck.",
            makes_bits=True,
        ),
    ] = ""
    active_from: Annotated[
        ActiveFrom | None,
        more(
            "Where adapters act: from the start, or from the answer on, so that what comes before crosses at no block, "
            "and is run once by blocks on the device. By default start; answer for a bottleneck, where the prompts "
            "have a common end.",
            metavar="WHERE",
            makes_bits=True,
        ),
    ] = None
    basis: Annotated[
        Basis | None,
        more(
            "A and B of a bottleneck. data, the default: the directions in which hidden states (A) and gradients (B) "
            "of some of your data vary most; weights: those of the base model's weights; random.",
            metavar="BASIS",
            makes_bits=True,
        ),
    ] = None
    basis_steps: Annotated[
        Count | None, rare("Steps whose data --basis data takes: by default 8, and no example twice.", makes_bits=True)
    ] = None
    init_adapter: Annotated[Path | None, more("Start from this PEFT LoRA adapter.")] = None


class Training(Section, frozen=True, kw_only=True):
    """Training"""

    epochs: Annotated[Amount, basic("How many times the run goes through the data.")] = 1.0
    steps: Annotated[Count | None, basic("Optimizer steps; overrides --epochs.")] = None
    batch_size: Annotated[Count, basic("Sequences of a micro-batch.", makes_bits=True)] = 4
    grad_accum: Annotated[Count, more("Micro-batches of a step.", makes_bits=True)] = 1
    seed: Annotated[
        Annotated[int, Meta(ge=0, lt=2**32)] | None,
        basic("The same number gives the same run again. By default random, and known to this device only."),
    ] = None


class Optimizer(Section, frozen=True, kw_only=True):
    """Optimizer: AdamW, with torch's names

    ``lr`` None: a run finds its own. ``warmup``: steps of linear warm-up, or a share of all steps where it is below 1.
    """

    lr: Annotated[
        Annotated[float, Meta(gt=0, le=1000)] | None,
        basic(
            "Peak learning rate. By default it is found before the first step, from the size of the first update that "
            "does best on the examples of the next steps.",
            makes_bits=True,
        ),
    ] = None
    schedule: Annotated[
        ScheduleName, more("Learning rate after warm-up: constant, linear or cosine.", metavar="SHAPE", makes_bits=True)
    ] = "linear"
    warmup: Annotated[
        Annotated[float, Meta(ge=0, le=MAX_STEPS)],
        more("Warm-up: steps, or a share of them if below 1.", makes_bits=True),
    ] = 0.03
    weight_decay: Annotated[
        Annotated[float, Meta(ge=0, le=1000)] | None,
        more(
            "Decoupled weight decay; by default 1 for a bottleneck, 0 for other kinds and with --init-adapter.",
            makes_bits=True,
        ),
    ] = None
    max_grad_norm: Annotated[Amount, more("Clip gradients to this norm; 0: never.", makes_bits=True)] = 1.0
    beta1: Annotated[Annotated[float, Meta(ge=0, lt=1)], rare("Decay of the first moment.", makes_bits=True)] = 0.9
    beta2: Annotated[Annotated[float, Meta(ge=0, lt=1)], rare("Decay of the second moment.", makes_bits=True)] = 0.999
    eps: Annotated[Positive, rare("Added to the root of the second moment.", makes_bits=True)] = 1e-8


class Placement(Section, frozen=True, kw_only=True):
    """Blocks on this device"""

    device_blocks: Annotated[
        Annotated[str, Meta(pattern=r"\A(auto|all|0|[1-9][0-9]{0,4})\Z")],
        basic(
            "How many of the model's last blocks run here. 0: none; the server exchanges with the adapters at every "
            "step. N: the server runs the others, once for each example, and training then needs no server. all: no "
            "server. auto: what dlora-edge plan recommends.",
            metavar="N|all|auto",
        ),
    ] = "0"
    memory: Annotated[
        str | None,
        more("Memory that auto and plan may count on, 2GB or 500MB; by default what is free.", metavar="SIZE"),
    ] = None
    cache_mb: Annotated[
        Amount | None,
        more(
            "Disk for what the server gave, for what blocks here compute alike again and again, and, with --passes, "
            "for what adapters read in the base pass, in MB, by default 4000. What does not fit is asked for, or "
            "computed, again at each step that needs it; with --passes nothing is kept where not all of it fits."
        ),
    ] = None
    keep_cache: Annotated[
        bool, more("Keep what the server gave when the run is done, for a longer one; it can be turned back into text.")
    ] = False
    cache_key_file: Annotated[
        SecretPath | None,
        more(
            "Encrypt what is kept of hidden states, with the key in this file (openssl rand -hex 32). Needs the "
            "extra encryption."
        ),
    ] = None


class Server(Section, frozen=True, kw_only=True):
    """Server"""

    server: Annotated[
        str | None, basic("HOST:PORT, ws://HOST:PORT or wss://HOST:PORT (TLS); not with --device-blocks all.")
    ] = None
    token_file: Annotated[
        SecretPath | None, basic("File with the token that lets this device in; else DLORA_TOKEN.")
    ] = None
    ca: Annotated[Path | None, more("Trust only servers that this authority signed (PEM).")] = None
    client_cert: Annotated[Path | None, more("This device's certificate (PEM).")] = None
    client_key: Annotated[SecretPath | None, more("Its key, where that is another file (PEM).")] = None
    insecure: Annotated[bool, more("Send the token over plain ws:// all the same.")] = False
    wire_dtype: Annotated[
        str | None,
        more(
            "Precision on the wire: int8, fp16 or fp32; and others for some roles: int8,embeddings=fp16. By default "
            "fp16; int8 for a bottleneck.",
            metavar="DTYPE",
            makes_bits=True,
        ),
    ] = None
    send: Annotated[
        Send,
        more(
            "What says a text to the server: embeddings, or token-ids, a hundredth of their size. The server can find "
            "the tokens either way; SECURITY.md says how.",
            metavar="WHAT",
            makes_bits=True,
        ),
    ] = "embeddings"
    passes: Annotated[
        Annotated[str, Meta(pattern=r"\A(live|auto|[1-4],[1-4])\Z")] | None,
        more(
            "How the adapters are asked. live, the default: group after group, two round trips each in a step. F,B: "
            "all groups at once, in F passes forward and B back, 1 to 4 each: F + B + 1 round trips a step, whatever "
            "the number of groups. auto: live or 2,2, whichever is quicker as network and server are measured before "
            "the run.",
            metavar="live|F,B|auto",
            makes_bits=True,
        ),
    ] = None
    window: Annotated[
        Annotated[str, Meta(pattern=r"\A(auto|[1-9]|1[0-6])\Z")],
        more(
            "How many micro-batches of a step (--grad-accum) are under way at a time, where the server takes as many; "
            "auto: all of them, 16 at most. What comes out is the same, sooner where the server is far.",
            metavar="N|auto",
        ),
    ] = "auto"
    max_retry_s: Annotated[
        Amount | None,
        more(
            "Seconds that the server may be gone, or say nothing new; 0: give up as soon as it is lost. Without it: "
            "for ever once the run has begun (dlora-edge serve: one minute), but a first connection that fails ends "
            "it."
        ),
    ] = None
    exchange_timeout_s: Annotated[
        Annotated[float, Meta(ge=1)], rare("Least seconds of silence after which the server counts as lost.")
    ] = 120.0


class Saving(Section, frozen=True, kw_only=True):
    """Saving and evaluating"""

    out: Annotated[Path | None, basic("Where the PEFT adapter, checkpoints and metrics go.")] = None
    save_every: Annotated[Count, more("Save checkpoint and adapter every so many steps.")] = 50
    eval_every: Annotated[
        Whole | None,
        more(
            "Evaluate every so many steps; 0: before and after. By default five times where that costs less than a "
            "tenth of the run, else before and after; with --keep best or --patience ten times."
        ),
    ] = None
    keep: Annotated[
        Keep,
        more(
            "Which adapter to save in the end: the last, or the one best on held-out data; auto: the last, and the "
            "best where the last is worse than none."
        ),
    ] = "auto"
    patience: Annotated[Count | None, more("End after so many evaluations in a row that are no better.")] = None
    on_worse: Annotated[
        OnWorse,
        basic("Where training makes the model worse than it was: say so and go on, or stop there, with exit code 14."),
    ] = "warn"
    tensorboard: Annotated[bool, more("Write TensorBoard's event files, too, into --out/tensorboard.")] = False


class KillRevive(Section, frozen=True, kw_only=True):
    """Kill and Revive

    What is not an option is when: see docs/concepts/kill-and-revive.md.
    """

    active_fraction: Annotated[
        Fraction,
        basic("Share of units that stay active; 1: all. Less saves traffic and costs quality.", makes_bits=True),
    ] = 1.0
    bytes_per_token: Annotated[
        Count | None,
        more(
            "In place of --active-fraction: as many units as keep a step of the steady state within so many bytes a "
            "token, up and down together."
        ),
    ] = None
    score: Annotated[
        ScoreName,
        more(
            "Which units are active: static, the same all the time; or those that rank highest by grad or sensitivity;"
            " or random, to compare with.",
            option="kr-score",
            metavar="SCORE",
            makes_bits=True,
        ),
    ] = "static"
    unit: Annotated[
        UnitKind,
        more("A unit: all adapters of a block, or those of one exchange group.", option="kr-unit", makes_bits=True),
    ] = "block"
    on_kill: Annotated[
        OnKill,
        more(
            "What becomes of a killed unit's effect: fade or bypass, it ends; hold_forward, it stays, for its forward "
            "traffic, and always with blocks on this device; give_to_server, the server gets what it has learnt and "
            "applies it without traffic.",
            option="kr-on-kill",
            metavar="STATE",
            makes_bits=True,
        ),
    ] = "fade"
    pin: Annotated[str, more("Units never killed: blocks 0,3,26-29.")] = ""
    static_units: Annotated[str, more("The units of --kr-score static; by default spread over the upper half.")] = ""
    warmup_steps: Annotated[
        Whole | None, rare("Steps before the first kill; by default 20, none for a bottleneck.", makes_bits=True)
    ] = None
    ramp_fraction: Annotated[
        Fraction | None,
        rare("Share of steps at which the budget is down; by default 0.25, 0 for a bottleneck.", makes_bits=True),
    ] = None
    kill_every: Annotated[Count, rare("Steps between kills.", makes_bits=True)] = 25
    revive_every: Annotated[Whole, rare("Steps between revivals; 0: never.", makes_bits=True)] = 50
    probation: Annotated[Whole, rare("Steps on trial.", makes_bits=True)] = 25


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it, in the order of ``--help``. Paths are absolute; what is left open is None, or says so."""

    device: Device = Device()
    server: Server = Server()
    data: Data = Data()
    adapter: Adapter = Adapter()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    placement: Placement = Placement()
    saving: Saving = Saving()
    kill_revive: KillRevive = KillRevive()

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """From fields by the names of their options, ``rank=8, kr_score="grad"``; or by section and key, as a table
        ``kill_revive={"probation": 5}``. Raises ``UsageError``."""
        return read_settings(given)

    def replaced(self, **given: Any) -> Settings:
        """These with some fields in place of others, by the same names. Raises ``UsageError``."""
        return read_settings(given, self)


@dataclass(frozen=True)
class Field:
    """One field, as commands and pages need it.

    Attributes:
        makes_bits: whether it changes what a run trains.
        section, key: its place; option: its name on the command line without the dashes in front, or where it has none
            what ``--set`` takes.
        kind: its type without limits, ``int | None``; meta: its limits by name.
    """

    section: str
    key: str
    option: str
    depth: Depth
    kind: Any
    default: Any
    help: str
    panel: str
    metavar: str | None
    is_secret: bool
    makes_bits: bool
    meta: Mapping[str, Any]

    @property
    def path(self) -> str:
        """``optimizer.lr``."""
        return f"{self.section}.{self.key}"

    @property
    def parameter(self) -> str:
        """Its name as a keyword: the option's, where it has one."""
        return self.option.replace("-", "_") if self.depth != "rare" else f"{self.section}_{self.key}"

    @property
    def words(self) -> str:
        """What a user writes to set it."""
        return f"--set {self.path}" if self.depth == "rare" else f"--{self.option}"

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"{VARIABLE}{self.parameter.upper()}"

    @property
    def given_kind(self) -> Any:
        """Its type where it is given: without None."""
        kinds = [each for each in get_args(self.kind) if each is not type(None)]
        return kinds[0] if len(kinds) == 1 and get_origin(self.kind) is not Literal else self.kind

    def value_in(self, settings: Any) -> Any:
        """What ``Settings``, or what was chosen from them, has for it."""
        return getattr(getattr(settings, self.section), self.key)


@cache
def fields_of(settings: type[msgspec.Struct] = Settings) -> tuple[Field, ...]:
    """Every field of every section, in order."""
    return tuple(
        each
        for section in msgspec.structs.fields(settings)
        if isinstance(section.type, type) and issubclass(section.type, Section)
        for each in _fields_of(section.name, section.type)
    )


def _fields_of(section: str, kind: type[Section]) -> Iterator[Field]:
    plain, hints = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    panel = (kind.__doc__ or "").strip().splitlines()[0]
    for each in msgspec.structs.fields(kind):
        limits: dict[str, Any] = {}
        about: dict[str, Any] = {}
        for note in _notes_of(hints[each.name]):
            limits |= {name: getattr(note, name) for name in _LIMITS if getattr(note, name) is not None}
            about |= {"help": note.description, **(note.extra or {})}
        yield Field(
            section=section,
            key=each.name,
            option=about.get("option", each.name.replace("_", "-")),
            depth=about["depth"],
            kind=plain[each.name],
            default=each.default,
            help=about["help"],
            panel=panel,
            metavar=about.get("metavar"),
            is_secret=about.get("secret", False),
            makes_bits=about.get("makes_bits", False),
            meta=limits,
        )


def _notes_of(hint: Any) -> Iterator[Meta]:
    """Every ``Meta`` of a type and of what stands inside it, the innermost first."""
    for part in get_args(hint):
        if isinstance(part, Meta):
            yield part
        else:
            yield from _notes_of(part)


def read_settings(given: Mapping[str, Any], start: Settings | None = None) -> Settings:
    """``start``, or the defaults, with what is given: fields by the names of their options or parameters, and sections
    as tables.

    Raises ``UsageError`` that names the field.
    """
    known = {each.parameter: each for each in fields_of()}
    sections = Settings.__struct_fields__
    tables: dict[str, dict[str, Any]] = {
        name: {} if start is None else msgspec.structs.asdict(getattr(start, name)) for name in sections
    }
    for name, value in given.items():
        field = known.get(name)
        if field is not None and not (name in sections and isinstance(value, Mapping)):
            tables[field.section][field.key] = value
        elif name in sections and isinstance(value, (Mapping, Section)):
            tables[name] |= msgspec.structs.asdict(value) if isinstance(value, Section) else dict(value)
        else:
            raise UsageError(f"there is no setting {name!r}; see docs/reference")
    words = {(each.section, each.key): each.words for each in fields_of()}
    for section, table in tables.items():
        for key, value in table.items():
            if isinstance(value, float) and not math.isfinite(value):  # no JSON has it
                name = words.get((section, key), f"{section}.{key}")
                raise UsageError(f"{name} {value} is no number; write one, or leave it out")
    try:
        return msgspec.convert(tables, Settings, dec_hook=read_path)
    except msgspec.ValidationError as error:
        raise UsageError(_limit_words(error, tables)) from None


def _limit_words(error: msgspec.ValidationError, tables: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong, by the words of the field that it is wrong with."""
    place = re.search(r"`\$\.(\w+)\.(\w+)", str(error))
    for field in fields_of():
        if place is not None and place.groups() == (field.section, field.key):
            given = str(tables[field.section].get(field.key))[:80]
            return f"{field.words} {given} is not understood, or out of range; write {wanted(field)}"
    return f"a setting is wrong: {structure_words(error)}"


def wanted(field: Field) -> str:
    """What a field takes, in words: ``a whole number from 1 up to 4,096``."""
    kind = field.given_kind
    if get_origin(kind) is Literal:
        return f"one of: {', '.join(get_args(kind))}"
    if field.metavar and "pattern" in field.meta:
        return field.metavar.replace("|", ", ")
    names = {int: "a whole number", float: "a number", Path: "a path", bool: "true or false"}
    limits = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
    said = [f"{words} {field.meta[name]:,}" for name, words in limits.items() if name in field.meta]
    if said and "ge" in field.meta and len(said) == 1:
        said.append("on")
    return " ".join((names.get(kind, "another value"), *said))


def read_path(kind: type, value: Any) -> Any:
    """A path as files and tables have it, absolute, for msgspec's ``dec_hook``."""
    if kind is Path and isinstance(value, (str, Path)):
        if not str(value) or "\0" in str(value):
            raise ValueError("a path is empty, or has a NUL in it")
        return Path(value).absolute()
    raise NotImplementedError(f"{kind.__name__} where {value!r} is")
