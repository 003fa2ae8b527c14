"""What a curious server recovers of short runs of each recipe: ``dlora-cloud audit`` on frames that really crossed.

Each recipe trains, evaluates or generates on 24 rows of real dialogue, against a server in a process of its own, with
``--record``; then the audit attacks. Verdicts and figures, never texts, are written into
docs/log/benchmarks/audit.json, which SECURITY.md and README quote; a test fails where they claim more.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from audit_noise import try_noise
from bars import write_bars
from children import cloud_server, log, need_bundle, run_json

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from dialogue import write_dialogue

from dlora.cloud.audit.observed import observe
from dlora.cloud.audit.tokenizer import truth_tokenizer
from dlora.cloud.audit.truth import load_truth
from dlora.cloud.model.base_model import load_base_model
from dlora.protocol.recording import read_recording

FILE: Final = Path("benchmarks") / "audit.json"  # in docs
COMMAND: Final = "python benchmarks/audit.py"
MODEL: Final = "smollm2-135m"
ROWS: Final = 24
TRAIN: Final = ("--steps", "4", "--batch-size", "6")
QUESTION: Final = "What is your favourite food?"
# Name: what is recorded, and how. Those that use an adapter take the one of the run that they name.
RECIPES: Final[dict[str, tuple[str, ...]]] = {
    "lora": ("train", "--kind", "lora", *TRAIN),
    "lora, int8": ("train", "--kind", "lora", "--wire-dtype", "int8", *TRAIN),
    "lora, token ids": ("train", "--kind", "lora", "--send", "token-ids", *TRAIN),
    "lora, --seed 7": ("train", "--kind", "lora", "--seed", "7", *TRAIN),
    "bottleneck": ("train", "--kind", "bottleneck", *TRAIN),
    "bottleneck, in passes": ("train", "--kind", "bottleneck", "--passes", "2,2", *TRAIN),
    "bottleneck, all positions": ("train", "--kind", "bottleneck", "--active-from", "start", *TRAIN),
    "ffa": ("train", "--kind", "ffa", *TRAIN),
    "trunk": ("train", "--device-blocks", "12", *TRAIN),
    "evaluate": ("evaluate", "--adapter", "lora"),
    "generate": ("generate", "--adapter", "lora", "--prompt", QUESTION, "--max-new-tokens", "24"),
    "generate, in passes": (
        "generate",
        "--adapter",
        "bottleneck, in passes",
        "--prompt",
        QUESTION,
        "--max-new-tokens",
        "24",
    ),
    "generate, lent": (
        "generate",
        "--adapter",
        "bottleneck",
        "--lend-adapter",
        "--prompt",
        QUESTION,
        "--max-new-tokens",
        "24",
    ),
    "generate, trunk": ("generate", "--adapter", "trunk", "--prompt", QUESTION, "--max-new-tokens", "24"),
}
TRIED: Final = (0.3, 1, 3, 10, 30)
"""Noise in place of embeddings. The file has blocks on the device as well, of an experiment that is finished."""
TRIED_ON: Final = "lora"
IN_TABLE: Final = ("text", "labels", "adapter", "gradients", "prompt lengths", "membership", "seed")


def main() -> None:
    """Run the benchmark; its result is one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--bundle-blocks", type=Path, default=Path("build/smollm2-blocks"), help="with 12 blocks")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="recipes")
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--docs", type=Path, default=Path("docs/log"), help="where benchmarks/audit.json is")
    arguments = parser.parse_args()
    if arguments.report:
        there = json.loads((arguments.docs / FILE).read_text(encoding="utf-8"))
        print(findings_table(there), defences_table(there), in_one_sentence(there), of_few_tokens(there), sep="\n\n")
        return
    need_bundle(arguments.bundle)
    need_bundle(arguments.bundle_blocks)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        data, _ = write_dialogue(directory, held_out=100, seed=0)
        data.write_text("".join(f"{line}\n" for line in data.read_text().splitlines()[:ROWS]))
        with cloud_server(MODEL, 2) as url:
            adapters = {words[1] for name in arguments.only if (words := RECIPES[name][1:])[0] == "--adapter"}
            for recipe in [name for name in RECIPES if name in {*arguments.only, *adapters}]:
                log(f"recording: {recipe}")
                _record(recipe, url, data, arguments, directory)
        found = {}
        for recipe in arguments.only:
            log(f"attacking: {recipe}")
            found[recipe] = _audit(recipe, directory)
    file = arguments.docs / FILE
    if TRIED_ON in found and file.exists():
        before = json.loads(file.read_text(encoding="utf-8")).get(TRIED_ON, {"defences": {}})
        found[TRIED_ON]["defences"] = before["defences"] | found[TRIED_ON]["defences"]
    write_bars(file, found)
    print(json.dumps(found, indent=1, ensure_ascii=False))


def findings_table(audit: dict[str, Any]) -> str:
    """Markdown: verdicts of each recipe. SECURITY.md has it as it is."""
    lines = [f"| recorded | {' | '.join(IN_TABLE)} |", "|---" * (len(IN_TABLE) + 1) + "|"]
    for recipe in RECIPES:
        cells = []
        for secret in IN_TABLE:
            if secret == "labels" and "labels never fed back" in audit[recipe]["findings"]:
                cells.append(_labels_of_trunk(audit[recipe]["findings"]))
                continue
            finding = audit[recipe]["findings"].get(secret, {"verdict": None, "attacks": []})
            verdict, attacks = finding["verdict"], finding["attacks"]
            cells.append(f"{verdict}{_figure(secret, attacks[0]) if attacks else ''}" if verdict else "")
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _labels_of_trunk(findings: dict[str, Any]) -> str:
    fed_back, others = findings["labels fed back as text"], findings["labels never fed back"]
    counts = others["why"].partition(" labels")[0]
    figure = _figure("labels", fed_back["attacks"][0])
    return f"{fed_back['verdict']}{figure} of those fed back as text; {others['verdict']} of the others, {counts}"


def _figure(secret: str, attack: dict[str, Any]) -> str:
    if secret == "seed":
        return ""
    if secret in ("adapter", "gradients"):
        return f", to {_error(attack)}"
    return f", {100 * attack['figure']:.4g} %"


def defences_table(audit: dict[str, Any]) -> str:
    """Markdown: what each defence hides of the text, and what it costs. SECURITY.md has it as it is."""
    lines = ["| in place of embeddings | text | nearest neighbour alone | loss without, with it |", "|---" * 4 + "|"]
    for name, tried in audit[TRIED_ON]["defences"].items():
        best, *_ = tried["attacks"]
        (naive,) = (each for each in tried["attacks"] if each["attack"] == "nearest neighbour")
        kind, _, amount = name.partition("=")
        blocks = "1 block" if amount == "1" else f"{amount} blocks"
        what = f"noise of {amount} × rms" if kind == "noise" else f"hidden states after {blocks} on the device"
        found = f"{tried['verdict']}, {100 * best['figure']:.4g} % by {best['attack']}"
        price = f"{tried['loss_without']:.2f}, {tried['loss']:.2f}"
        lines.append(f"| {what} | {found} | {100 * naive['figure']:.4g} % | {price} |")
    return "\n".join(lines)


def in_one_sentence(audit: dict[str, Any]) -> str:
    """What README says of the default recipe."""
    findings = audit["bottleneck"]["findings"]
    text, labels, adapter = (findings[secret]["attacks"][0] for secret in ("text", "labels", "adapter"))
    shares = f"{100 * text['figure']:.4g} % of the text, {100 * labels['figure']:.4g} % of the labels"
    return f"{shares}, and the trained matrices with an error of {_error(adapter)}"


def of_few_tokens(audit: dict[str, Any]) -> str:
    """What SECURITY.md says of how little an attack on adapters takes."""
    wanted = (
        ("lora", "least squares, two-sided, few tokens"),
        ("bottleneck", "least squares, few tokens, forward only"),
        ("bottleneck", "replay of the optimiser"),
    )
    found = []
    for recipe, name in wanted:
        (attack,) = (each for each in audit[recipe]["findings"]["adapter"]["attacks"] if each["attack"] == name)
        found.append(f"{attack['found']} by {name}")
    return "; ".join(found)


def _error(attack: dict[str, Any]) -> str:
    """The median relative error of an attack on matrices."""
    found = re.search(r" to (\S+ %) \(", attack["found"])
    assert found
    return found[1]


def _record(recipe: str, url: str, data: Path, arguments: argparse.Namespace, directory: Path) -> None:
    command, *options = RECIPES[recipe]
    bundle = arguments.bundle_blocks if "trunk" in recipe else arguments.bundle
    if options[0] == "--adapter":
        options[1] = str(directory / "runs" / options[1])
    if command in ("train", "evaluate"):
        options += ["--data", str(data)]
    if command == "train":
        options += ["--out", str(directory / "runs" / recipe)]
        if "trunk" not in recipe:
            options += ["--eval", str(data)]  # while an adapter rests, more of it is seen
    record = directory / "records" / recipe
    run_json("-m", "dlora.edge", command, "--bundle", bundle, "--server", url, *options, "--record", record, "--json")


def _audit(recipe: str, directory: Path) -> dict[str, Any]:
    record = directory / "records" / recipe
    started = time.perf_counter()
    recorded = ("--frames", record / "frames", "--truth", record / "truth")
    said = run_json("-m", "dlora.cloud", "audit", MODEL, *recorded, "--out", directory / "page.html", "--json")
    shown = " ".join(f"'{word}'" if " " in word else word for word in RECIPES[recipe])
    return {
        "command": f"{COMMAND} --only '{recipe}'",
        "recorded": {"as": f"dlora-edge {shown}", **said["recorded"]},
        "findings": {each["secret"]: _short(each) for each in said["findings"]},
        "defences": _defences(record) if recipe == TRIED_ON else {},
        "wall_s": round(time.perf_counter() - started, 1),
    }


def _defences(record: Path) -> dict[str, Any]:
    """Noise, attacked in place of what crossed."""
    recording, base, found = read_recording(record / "frames"), load_base_model(MODEL), {}
    with truth_tokenizer(record / "truth") as tokenizer:
        truth = load_truth(record / "truth", recording.id, observe(recording), tokenizer)
        for times_rms in TRIED:
            tried = try_noise(times_rms, truth, base)
            losses = {name: round(tried[name], 3) for name in ("loss", "loss_without")}
            found[f"noise={times_rms:g}"] = {"claim": tried["claim"], **losses, **_short(tried["finding"])}
    return found


def _short(finding: dict[str, Any]) -> dict[str, Any]:
    """A finding without numbers that nobody quotes."""
    attacks = [
        {"attack": each["name"], "figure": float(f"{each['figure']:.6g}"), "found": each["found"],
         "interval": [float(f"{bound:.4g}") for bound in each["interval"]], "guess": float(f"{each['guess']:.4g}")}
        for each in finding["attacks"]
    ]  # fmt: skip
    return {"verdict": finding["verdict"], "attacks": attacks, "why": finding["why"]}


if __name__ == "__main__":
    main()
