"""What the runs of ``defaults.py`` come to: the bars of defaults.json, and a section of docs/log/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from bars import Entry, at_least, at_most, write_bars
from defaults_places import ADAPTED, BASE, GRID, LORA, REWRITTEN_SETS, SMOLLM2, TRUNK, all_places
from economy_data import SETS as ALL_SETS
from economy_recipes import BASELINE, DEFAULT, FORMER, PASSES, RECIPES
from economy_results import Result
from economy_runs import CHOOSING_SEED, Finished, Run, best_rate, next_rate
from sections import DEFAULTS, with_section

from dlora.edge.files import write_atomically

FILE: Final = Path("benchmarks") / "defaults.json"
PASSES_MODEL: Final = "gemma3"
"""Of the models that are trained here, the one on which passes are held against live."""
COMMAND: Final = "python benchmarks/defaults.py --only"

Where = tuple[str, str]  # model and set
ORIGINALS: Final = tuple((place.model, name) for place in all_places() if place.is_original for name in place.sets)
REWRITTEN: Final = tuple((place.model, name) for place in all_places() if not place.is_original for name in place.sets)


class Table:
    """The finished runs, by where they were made. Where a recipe has several settings, the newest line counts."""

    def __init__(self, finished: Finished) -> None:
        self._runs: dict[tuple[str, str, str], dict[float | None, dict[int, Run]]] = {}
        for run in finished.values():
            of = run.settings
            self._runs.setdefault((of.model, of.set, of.recipe), {}).setdefault(of.lr, {})[of.seed] = run

    def with_rate(self, where: Where, recipe: str, lr: float | None) -> Result | None:
        """All seeds of a recipe with one rate that did not diverge; None where there is none."""
        runs = self._runs.get((*where, recipe), {}).get(lr, {})
        ended_well = tuple(runs[seed] for seed in sorted(runs) if runs[seed].test is not None)
        return Result(where[1], recipe, lr, ended_well) if ended_well else None

    def usual(self, where: Where, recipe: str) -> Result | None:
        """Without ``--lr``."""
        before = {BASE: RECIPES[BASELINE], FORMER: RECIPES[FORMER]}
        return self.with_rate(where, recipe, before[recipe].usual_lr(where[1]) if recipe in before else None)

    def best(self, where: Where, recipe: str) -> Result | None:
        """At the rate of the grid with the lowest validation loss; None where it has not both its neighbours tried."""
        rates = self._runs.get((*where, recipe), {})
        tried = {lr: rates[lr][CHOOSING_SEED].validation_loss for lr in GRID if CHOOSING_SEED in rates.get(lr, {})}
        if not tried or next_rate(tried, next(iter(tried)), GRID) is not None:
            return None
        lr = best_rate(tried)
        return None if lr is None else self.with_rate(where, recipe, lr)

    def original(self, where: Where, recipe: str) -> Result | None:
        """Of the model that is written otherwise, without ``--lr``."""
        return self.usual((SMOLLM2, where[1]), recipe)

    def over_base(self, where: Where, recipe: str) -> float | None:
        """The loss without ``--lr`` over the base model's; infinite where a run diverged."""
        base, ours = self.usual(where, BASE), self.usual(where, recipe)
        if base is None or self._diverged(where, recipe):
            return None if base is None else math.inf
        return None if ours is None else ours.loss / base.loss

    def gain_kept(self, where: Where) -> float | None:
        """The default's gain over the base model, of that of LoRA at its best."""
        base, ours, theirs = self.usual(where, BASE), self.usual(where, DEFAULT), self.best(where, BASELINE)
        if base is None or ours is None or theirs is None or theirs.loss >= base.loss:
            return None
        return (base.loss - ours.loss) / (base.loss - theirs.loss)

    def _diverged(self, where: Where, recipe: str) -> bool:
        """Whether a run without ``--lr`` did."""
        runs = self._runs.get((*where, recipe), {}).get(None, {})
        return any(run.test is None for run in runs.values())


# -- bars ------------------------------------------------------------------------------------------------

Value = Callable[[Where], float | None]
Find = Callable[[Where], Result | None]
Measure = Callable[[Result, Result], float]


@dataclass(frozen=True)
class Bar:
    """The worst of many numbers has to reach ``bar``.

    Attributes:
        places: where it is measured; recipes: what has to be run there, for people and for the command.
        value: what was found somewhere; None where runs are missing.
        least: whether the bar is the least that is allowed.
    """

    what: str
    bar: float
    places: Sequence[Where]
    value: Value
    recipes: tuple[str, ...]
    least: bool = False

    def entry(self) -> Entry | None:
        """As defaults.json has it; None where nothing was found."""
        found = {where: value for where in self.places if (value := self.value(where)) is not None}
        if not found:
            return None
        worst = (min if self.least else max)(found, key=lambda where: found[where])
        models = dict.fromkeys([*([SMOLLM2] if self.places[0] in REWRITTEN else []), *dict(self.places)])
        command = f"{COMMAND} " + " ".join(f"'{model}/*/{name}'" for model in models for name in self.recipes)
        entry = (at_least if self.least else at_most)(self.bar, found[worst], command)
        if not entry["holds"]:
            sign = -1 if self.least else 1
            misses = [where for where in found if sign * (found[where] - self.bar) > 0]
            entry["reason"] = "misses: " + ", ".join(f"{'/'.join(where)} {found[where]:.4g}" for where in misses)
        missing = ["/".join(where) for where in self.places if where not in found]
        if missing:
            not_run = f"{len(missing)} of {len(self.places)} are not run"
            entry |= {"holds": False, "reason": "; ".join(filter(None, [entry.get("reason"), not_run]))}
            entry["missing"] = missing
        return {"what": self.what, **entry, "worst": "/".join(worst), "measured": len(found)}


def make_bars(table: Table) -> dict[str, Bar]:
    """All of them, by name."""
    bars: dict[str, Bar] = {}
    for recipe in ADAPTED:
        share, nats, points = (2.5, 0.01, 1.0) if recipe == DEFAULT else (5.0, 0.015, 1.5)
        finders = (table.usual, table.best, table.original)
        of_usual, best, of_original = (partial(find, recipe=recipe) for find in finders)
        over_base = partial(table.over_base, recipe=recipe)
        bars[f"{recipe}_over_base"] = Bar("loss over the base model's", 1.0, ORIGINALS, over_base, (recipe, BASE))
        text, intents = _by_kind(ORIGINALS)
        for name, what, bar, places, measure in (
            ("text", "regret, %", share, text, _percent),
            ("intents", "regret, nats a label", nats, intents, _nats),
            ("points", "regret, points", points, intents, _points),
        ):
            value = _difference(measure, of_usual, best)
            bars[f"{recipe}_regret_{name}"] = Bar(what, bar, places, value, (recipe,))
        text, intents = _by_kind(REWRITTEN)
        rows = [
            ("_text", "loss off the original's, %", 1.0, text, _percent),
            ("_intents", "loss off, nats a label", 0.004, intents, _nats),
            ("_points", "accuracy off, points", 1.0, intents, _points),
        ]
        if recipe != DEFAULT:
            rows = [("", "loss off the original's, %", 2.0, REWRITTEN, _percent)]
        for name, what, bar, places, measure in rows:
            value = _difference(_off(measure), of_usual, of_original)
            bars[f"{recipe}_rewritten{name}"] = Bar(what, bar, places, value, (recipe,))
    text, intents = _by_kind([where for where in ORIGINALS if where[0] == PASSES_MODEL])
    in_passes, live = (partial(table.usual, recipe=recipe) for recipe in (PASSES, DEFAULT))
    for name, what, bar, places, measure in (
        ("text", "in passes 2,2, used live: loss above live's, %", 1.0, text, _percent),
        ("intents", "in passes 2,2, used live: loss above live's, nats a label", 0.008, intents, _nats),
    ):
        bars[f"passes_{name}"] = Bar(what, bar, places, _difference(measure, in_passes, live), (PASSES, DEFAULT))
    what, against = "gain over the base, of LoRA's at its best", (DEFAULT, BASE, BASELINE)
    bars["default_gain_kept"] = Bar(what, 0.75, ORIGINALS, table.gain_kept, against, least=True)
    return bars


def _by_kind(places: Sequence[Where]) -> tuple[tuple[Where, ...], tuple[Where, ...]]:
    """Those of text, whose loss is compared in percent, and those of answers of a few."""
    text = tuple(where for where in places if ALL_SETS[where[1]].relative)
    return text, tuple(where for where in places if where not in text)


def _difference(measure: Measure, find_ours: Find, find_theirs: Find) -> Value:
    """Of two results, with the seeds that both have."""

    def value(where: Where) -> float | None:
        ours, theirs = find_ours(where), find_theirs(where)
        if ours is None or theirs is None or not (seeds := set(ours.seeds) & set(theirs.seeds)):
            return None
        return measure(ours.of_seeds(tuple(seeds)), theirs.of_seeds(tuple(seeds)))

    return value


def _percent(ours: Result, theirs: Result) -> float:
    return 100 * (ours.loss / theirs.loss - 1)


def _nats(ours: Result, theirs: Result) -> float:
    return ours.loss - theirs.loss


def _points(ours: Result, theirs: Result) -> float:
    return 100 * (theirs.accuracy - ours.accuracy)


def _off(measure: Measure) -> Measure:
    """In either direction."""
    return lambda ours, theirs: abs(measure(ours, theirs))


# -- the page --------------------------------------------------------------------------------------------

INTRO: Final = f"""## {DEFAULTS}

    {COMMAND} 'gpt2/*'    # a model, MODEL/SET or MODEL/SET/RECIPE; hours for all of it, in pieces
    python benchmarks/defaults.py --report           # this section, of the runs that stand in defaults-runs.jsonl

What a user gets who names no learning rate. *Best* is the rate of a grid ({GRID[0]:g} to {GRID[-1]:g}, by doubles) with
the lowest loss on validation rows, both its neighbours tried; all losses here are those of the test rows. *Regret* is
the loss without `--lr` less that at the best rate; *kept* is the default's gain over the base model as a share of that
of LoRA without gains (rank 8 on q and v of all blocks, at its best rate). gpt2, gemma3, gpt_neox and qwen2 are models
of eight blocks and 256 channels of these families, trained for minutes on docstrings (`benchmarks/small_models.py`):
worse than any model that is used, and with weights of a real training. Three seeds of the default and of LoRA without
gains where the row says so; seed 0 of all that is a grid's best, of `--kind lora` and of `--device-blocks N`. The
guard has no part in it: tested is what a run ends with.
"""

REWRITTEN_INTRO: Final = """### The same model written otherwise

SmolLM2 with its norms' weights times c and the weights that read them divided by c (*norms*), or v and up times c and
o and down divided by c (*values*): the same function, to the bit, as c is a power of two. Test losses without `--lr`,
seed 0.
"""


def write_report(finished: Finished, docs: Path) -> dict[str, Any]:
    """Write bars and section; what the bars are."""
    table = Table(finished)
    found = {name: entry for name, bar in make_bars(table).items() if (entry := bar.entry()) is not None}
    write_bars(docs / FILE, found, forget=make_bars(table))
    page = docs / "benchmarks.md"
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    lines = [INTRO, *_bar_lines(found), *_model_lines(table), REWRITTEN_INTRO, *_rewritten_lines(table)]
    write_atomically(page, with_section(before, DEFAULTS, "\n".join(lines)).encode())
    return found


def _bar_lines(found: Mapping[str, Entry]) -> Iterator[str]:
    yield "| bar | | value | worst at | measured at | holds |\n|---|---|---|---|---|---|"
    for name, entry in found.items():
        sign = "≥" if name == "default_gain_kept" else "≤"
        wanted = entry["measured"] + len(entry.get("missing", ()))
        cells = [f"`{name}`: {entry['what']}", f"{sign} {entry['bar']:g}", f"{entry['value']:.3g}", entry["worst"]]
        cells += [f"{entry['measured']} of {wanted}", "yes" if entry["holds"] else f"no; {entry['reason']}"]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _model_lines(table: Table) -> Iterator[str]:
    yield (
        "| model | set | base | LoRA without gains, best | default | its best | kept | `--kind lora` | its best "
        "| `--device-blocks N` | its best | seeds |\n" + 12 * "|---" + "|"
    )
    for where in ORIGINALS:
        default = table.usual(where, DEFAULT)
        if default is None:
            continue
        share = table.gain_kept(where)
        cells = [*where, _loss(table.usual(where, BASE)), _loss(table.best(where, BASELINE), rate=True)]
        cells += [_loss(default, rate=True), _loss(_like(table.best(where, DEFAULT), default), rate=True)]
        cells.append("" if share is None else f"{share:.0%}")
        for recipe in (LORA, TRUNK):
            usual = table.usual(where, recipe)
            cells += [_loss(usual, rate=True), _loss(_like(table.best(where, recipe), usual), rate=True)]
        yield f"| {' | '.join([*cells, ', '.join(map(str, default.seeds))])} |"
    yield ""


def _rewritten_lines(table: Table) -> Iterator[str]:
    names = {DEFAULT: "default", FORMER: "default without gains", LORA: "`--kind lora`", TRUNK: "`--device-blocks N`"}
    columns = [
        f"{title}, {ALL_SETS[name].title.rpartition(',')[0]}" for title in names.values() for name in REWRITTEN_SETS
    ]
    yield f"| c | {' | '.join(columns)} |\n" + (1 + len(columns)) * "|---" + "|"
    models = [SMOLLM2, *dict(REWRITTEN)]
    for model in models:
        cells = [_loss(_seed_0(table.usual((model, name), recipe))) for recipe in names for name in REWRITTEN_SETS]
        if any(cells):
            yield f"| {model.removeprefix(SMOLLM2).replace('-', ' ').strip() or 'as it is'} | {' | '.join(cells)} |"
    yield ""


def _like(result: Result | None, other: Result | None) -> Result | None:
    """With the seeds that the other has as well; all where there are none."""
    common = () if result is None or other is None else tuple(set(result.seeds) & set(other.seeds))
    return result.of_seeds(common) if result is not None and common else result


def _seed_0(result: Result | None) -> Result | None:
    return None if result is None or 0 not in result.seeds else result.of_seeds((0,))


def _loss(result: Result | None, *, rate: bool = False) -> str:
    if result is None:
        return ""
    right = "" if ALL_SETS[result.set_name].relative else f", {result.accuracy:.1%}"
    return f"{result.loss:.4f}{right}" + (f" ({result.rate:g})" if rate else "")
