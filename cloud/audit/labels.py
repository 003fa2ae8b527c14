"""Labels: which attacks are run on a recording, and how they are scored."""

from __future__ import annotations

import torch

from dlora.cloud.model.base_model import BaseModel, find_head

from .adapter import NOTHING_CROSSES
from .finding import Finding, by_construction, found_by, nothing_there
from .label_matching import match_labels
from .observed import Observed, SeenMicroBatch, floats
from .scoring import Attack, commonest, share
from .text import FoundText, examples_of, true_texts
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
        key = ("basis", index) if begun.mode == "basis" else (begun.step,)
        steps.setdefault(key, []).append((micro_batch, true))
    head, right, likeliest, found, texts = find_head(base), 0, 0, [], set()
    for step in steps.values():
        hidden = torch.cat([floats(each.last_hidden) for each, _ in step if each.last_hidden is not None])
        grads = torch.cat([floats(each.last_grad) for each, _ in step if each.last_grad is not None])
        wanted = torch.cat([torch.from_numpy(true.labels) for _, true in step])
        right += int((match_labels(hidden, grads, head) == wanted).sum())
        said = torch.cat([head(rows.to(head.weight)).argmax(1).cpu() for rows in hidden.split(256)])
        likeliest += int((said == wanted).sum())
        found.append(wanted)
        texts |= {text.tobytes() for _, true in step for text in true.texts()}
    if not found:
        return []
    guess, labels = commonest(torch.cat(found)), sum(map(len, found))
    return [
        share("label matching and back-substitution", right, labels, len(texts), "labels", guess=guess),
        share("what the model itself would say", likeliest, labels, len(texts), "labels", guess=guess),
    ]


def _read_in_text(seen: Observed, truth: Truth, found: FoundText) -> list[Attack]:
    """A label that was fed back is the next token of the text."""
    right, every = 0, []
    texts = set()
    for ids, micro_batch, true in zip(found.ids, seen.micro_batches, truth.micro_batches, strict=False):
        ends = set(torch.tensor(micro_batch.lengths).cumsum(0).tolist())
        for position, label in zip(micro_batch.label_positions, true.labels.tolist(), strict=False):
            fed_back = position + 1 < len(ids) and position + 1 not in ends
            right += fed_back and int(ids[position + 1]) == label
        every.append(torch.from_numpy(true.labels))
        texts |= {text.tobytes() for text in true.texts()} if len(true.labels) else set()
    labels = torch.cat(every) if every else torch.zeros(0, dtype=torch.int64)
    if not len(labels):
        return []
    name = "the next token of the text found"
    return [share(name, right, len(labels), len(texts), "labels", guess=commonest(labels))]


def _of_first_blocks(seen: Observed, truth: Truth, found: FoundText) -> list[Finding]:
    """Labels never fed back do not cross; the others are text."""
    crossed = true_texts(seen, truth, found)
    beginnings = {tuple(text[:length]) for text in crossed for length in range(1, len(text) + 1)}
    goes_on = {tuple(text[:length]): text[length] for text in found.texts(seen) for length in range(1, len(text))}
    never: list[int] = []
    fed_back = right = 0
    texts = set()
    for text, example in zip(found.texts(seen), examples_of(truth), strict=False):
        if example is None:
            continue
        ids = example.ids.tolist()
        texts.add(tuple(ids))
        for position in example.label_positions.tolist():
            # It is text where this text goes on, or another one does that begins alike.
            if tuple(ids[: position + 2]) not in beginnings:
                never.append(ids[position + 1])
                continue
            fed_back += 1
            right += goes_on.get(tuple(text[: position + 1])) == ids[position + 1]
    if not texts:
        return [nothing_there("labels never fed back", "nothing is labelled in this recording")]
    findings = []
    if never:
        same = f", all of them {truth.text_of(never[:1])!r}" if len(set(never)) == 1 else ""
        why = f"{len(never):,} of {len(never) + fed_back:,} labels{same}; {NOTHING_CROSSES}"
        findings.append(by_construction("labels never fed back", why))
    if fed_back:
        attack = share("the next token of the text found", right, fed_back, len(texts), "labels")
        findings.append(
            found_by("labels fed back as text", [attack], "words of an answer are text for the ones that follow")
        )
    return findings
