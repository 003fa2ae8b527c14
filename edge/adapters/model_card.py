"""The model card beside a saved adapter: ``README.md``, as PEFT writes it and the Hugging Face hub reads it.

Names and settings in it may be strangers' text: they are quoted for YAML, and can begin nothing in Markdown.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Final

from dlora.protocol.adapter_record import AdapterRecord, TrainingRecord
from dlora.protocol.text import one_line

CARD_NAME: Final = "README.md"
_MAX_TEXT: Final = 300


def model_card(
    modules: int,
    r: int,
    lora_alpha: float,
    base_model_name: str,
    target_modules: Sequence[str] = (),
    *,
    acts_on_answers: bool,
    record: AdapterRecord | None = None,
) -> str:
    """The card's text.

    Args:
        modules: how many have an adapter.
        target_modules: what the user asked for; none: nobody knows.
        acts_on_answers: whether it is an activated LoRA.
        record: what else is known of it.
    """
    asked = f" of the target modules {_plain(', '.join(target_modules))}" if target_modules else ""
    lines = [
        *_front_matter(base_model_name),
        "",
        "# LoRA adapter",
        "",
        f"Made with dlora for {_code(base_model_name)}: rank {r}, alpha {lora_alpha:g}, {modules} modules{asked}.",
        *_about(record, acts_on_answers=acts_on_answers),
        "",
        "## How to use it",
        "",
        "```python",
        "from peft import PeftModel",
        *_rounding(record),
        "",
        'model = PeftModel.from_pretrained(base_model, "path/to/this/directory")',
        "```",
        "",
        "On a device, with a bundle of the base model and a server that runs its blocks:",
        "",
        "```sh",
        "dlora-edge generate --bundle BUNDLE --server ws://HOST:PORT --adapter path/to/this/directory --prompt Hello",
        "```",
    ]
    if record is not None:
        if record.training is not None:
            lines += _training(record.training)
        versions = record.training.versions if record.training is not None else {}
        lines += ["", "### Framework versions", "", f"- dlora {_plain(record.software)}"]
        lines += [f"- {_plain(name)} {_plain(version)}" for name, version in versions.items()]
    return "\n".join(lines) + "\n"


def _rounding(record: AdapterRecord | None) -> list[str]:
    """What gives a base model the weights that the adapter was trained for, where they are not its own."""
    if record is None or record.base_weight_format == "full":
        return []
    return [
        "from dlora.cloud.model.low_bits import round_to_low_bits",
        "",
        f'round_to_low_bits(base_model, "{record.base_weight_format}")  # what it was trained for',
    ]


def _front_matter(base_model_name: str) -> list[str]:
    tags = sorted([f"base_model:adapter:{base_model_name}", "dlora", "lora", "transformers"])
    return [
        "---",
        f"base_model: {_yaml(base_model_name)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {_yaml(tag)}" for tag in tags),
        "---",
    ]


def _about(record: AdapterRecord | None, *, acts_on_answers: bool) -> list[str]:
    lines = []
    if acts_on_answers:
        lines += [
            "",
            "It is an activated LoRA: it acts from the beginning of the answer on (`alora_invocation_tokens`), and the "
            "prompt is the base model's own. PEFT 0.18 or newer loads it so, and cannot merge it into the base model: "
            "`dlora-edge train --active-from start` gives one that can be merged.",
        ]
    if record is not None:
        lines += [
            "",
            "| | |",
            "|---|---|",
            f"| trained as | {_code(record.kind)} |",
            f"| base model's fingerprint | `{record.base_fingerprint}` |",
            f"| its linear weights | {record.base_weight_format} |",
            f"| SHA-256 of the weights | `{record.weights_sha256}` |",
        ]
    return lines


def _training(training: TrainingRecord) -> list[str]:
    lines = [
        "",
        "## Training",
        "",
        f"{training.steps:,} steps, with data of {training.examples:,} examples: {training.tokens:,} tokens, "
        f"{training.labelled:,} of them with a label.",
        "",
        "| | |",
        "|---|---|",
    ]
    losses = (training.eval_loss_before, training.eval_loss_after)
    if any(each is not None for each in losses):
        count = f", over {training.eval_tokens:,} labels" if training.eval_tokens else ""
        before, after = ("?" if each is None else f"{each:.4f}" for each in losses)
        lines.append(f"| held-out loss before and after{count} | {before} → {after} |")
    if training.eval_loss_live is not None:
        worse = ", which is worse" if training.is_worse_live else ""
        lines.append(f"| the same used live, as PEFT does, not in passes | {training.eval_loss_live:.4f}{worse} |")
    lines += [
        f"| bytes on the wire a token, both ways | {training.bytes_per_token:,.0f} |",
        f"| round trips a step | {training.round_trips_per_step:,.1f} |",
        *([f"| blocks on the device stored as | {_plain(training.block_dtype)} |"] if training.block_dtype else []),
        "",
        "The recipe, as options of `dlora-edge train`:",
        "",
        "```sh",
        one_line(recipe_line(training), 2000).replace("`", "'"),
        "```",
    ]
    return lines


def recipe_line(training: TrainingRecord) -> str:
    """The recipe as options of a command line, quoted for a shell."""
    words = []
    for name, value in training.recipe.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(f"{value:g}" if isinstance(value, float) else str(value))
    return shlex.join(words)


def _yaml(text: str) -> str:
    """A quoted string: what JSON writes of printable text is YAML as well."""
    return json.dumps(one_line(text, _MAX_TEXT), ensure_ascii=False)


def _plain(text: str) -> str:
    """As one line in which nothing is markup: no code span, link, tag or table cell begins or ends in it."""
    return re.sub(r"[`<>\[\]|*]", "'", one_line(text, _MAX_TEXT))


def _code(text: str) -> str:
    """As a code span, in a table's cell too."""
    return f"`{re.sub(r'[`|]', chr(39), one_line(text, _MAX_TEXT))}`"
