"""Labels: which attacks are run on a recording, and how they are scored."""

from __future__ import annotations

import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel, find_head

from .adapter import NOTHING_CROSSES
from .finding import Finding, by_construction, found_by, nothing_there
from .label_matching import match_labels
from .observed import Observed, SeenMicroBatch, floats
from .scoring import Attack, share
from .text import FoundText, examples_of
from .truth import TrueMicroBatch, Truth


def audit_labels(seen: Observed, truth: Truth, base: BaseModel, found: FoundText) -> list[Finding]:
    """What the device compares the model's answers with."""
    if seen.has_only_first_blocks:
        return _of_first_blocks(seen, truth, found)
    attacks = [*_matched(seen, truth, base), *_read_in_text(seen, truth, found)]
    if not attacks:
        return [nothing_there("labels", "nothing is labelled in this recording")]
    return [found_by("labels", attacks, "the gradient of the last hidden states names the label")]


def _matched(seen: Observed, truth: Truth, base: BaseModel) -> list[Attack]:
    """From the gradients of the last hidden states, of all micro-batches of a step together."""
    steps: dict[tuple[object, ...], list[tuple[SeenMicroBatch, TrueMicroBatch]]] = {}
    for index, (micro_batch, true) in enumerate(zip(seen.micro_batches, truth.micro_batches, strict=True)):
        if micro_batch.last_grad is None or micro_batch.last_hidden is None:
            continue
        begun = micro_batch.begun
        # Those of the mode basis are scaled by themselves.
        key = ("basis", index) if begun.mode == "basis" else (micro_batch.reports, begun.step)
        steps.setdefault(key, []).append((micro_batch, true))
    head, right, guessed, labels, texts = find_head(base), 0, 0, 0, 0
    for step in steps.values():
        hidden = torch.cat([floats(each.last_hidden) for each, _ in step if each.last_hidden is not None])
        grads = torch.cat([floats(each.last_grad) for each, _ in step if each.last_grad is not None])
        wanted = torch.cat([torch.from_numpy(true.labels) for _, true in step])
        matched = match_labels(hidden.to(base.device), grads.to(base.device), head)
        right += int((matched.labels.cpu() == wanted).sum())
        guessed += int((_likeliest(hidden, base) == wanted).sum())
        labels += len(wanted)
        texts += sum(len(true.lengths) for _, true in step)
    if not labels:
        return []
    return [share("label matching and back-substitution", right, labels, texts, "labels", guess=guessed / labels)]


def _likeliest(hidden: Tensor, base: BaseModel) -> Tensor:
    """What the model itself would say: a guess that needs no attack."""
    head = find_head(base)
    return torch.cat([head(rows.to(head.weight)).argmax(1).cpu() for rows in hidden.split(256)])


def _read_in_text(seen: Observed, truth: Truth, found: FoundText) -> list[Attack]:
    """A label that was fed back is the next token of the text."""
    right = labels = texts = 0
    for ids, micro_batch, true in zip(found.ids, seen.micro_batches, truth.micro_batches, strict=False):
        ends = set(torch.tensor(micro_batch.lengths).cumsum(0).tolist())
        for position, label in zip(micro_batch.label_positions, true.labels.tolist(), strict=False):
            fed_back = position + 1 < len(ids) and position + 1 not in ends
            right += fed_back and int(ids[position + 1]) == label
            labels += 1
        texts += len(true.lengths) if len(true.labels) else 0
    return [share("the next token of the text found", right, labels, texts, "labels")] if labels else []


def _of_first_blocks(seen: Observed, truth: Truth, found: FoundText) -> list[Finding]:
    """Labels never fed back do not cross; the others are text."""
    fed_back = right = never = texts = 0
    for text, example in zip(found.texts(seen), examples_of(seen, truth), strict=False):
        if example is None:
            continue
        texts += 1
        for position in example.label_positions.tolist():
            if position + 1 >= len(text):
                never += 1
                continue
            fed_back += 1
            right += text[position + 1] == int(example.ids[position + 1])
    if not texts:
        return [nothing_there("labels", "nothing is labelled in this recording")]
    findings = [
        by_construction(
            "labels",
            f"those never fed back as text, {never:,} of {never + fed_back:,}: {NOTHING_CROSSES}",
        )
    ]
    if fed_back:
        attack = share("the next token of the text found", right, fed_back, texts, "labels")
        findings.append(
            found_by("labels fed back as text", [attack], "words of an answer are text for the ones that follow")
        )
    return findings
