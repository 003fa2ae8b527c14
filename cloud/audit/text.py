"""Text, and what follows from it: which tokens, which examples, where prompts end, a phrase that somebody looks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from dlora.cloud.model.base_model import BaseModel

from .finding import Finding, found_by, nothing_there
from .membership import is_member, swap_ends
from .nearest_neighbour import embedding_table, nearest_tokens
from .observed import Observed, whole_texts
from .prompt_ends import common_marker_ends, first_labels
from .scoring import Attack, commonest, share
from .truth import TrueExample, Truth

MOST_TOKENS: Final = 20_000
MOST_CANDIDATES: Final = 200


@dataclass(frozen=True)
class FoundText:
    """What an attack made of the tokens of each micro-batch, int64 (tokens,), as far as it looked."""

    attack: str
    ids: list[Tensor]

    def texts(self, seen: Observed) -> list[list[int]]:
        """Whole ones, in order."""
        return whole_texts([ids.tolist() for ids in self.ids], seen.micro_batches)


def find_text(seen: Observed, base: BaseModel) -> FoundText:
    """The tokens of what was sent, of the first ``MOST_TOKENS`` tokens."""
    table = embedding_table(base)
    found: list[Tensor] = []
    attack = "sent as they are"
    tokens = 0
    for micro_batch in seen.micro_batches:
        if tokens >= MOST_TOKENS:
            break
        tokens += micro_batch.begun.tokens
        if micro_batch.begun.token_ids is not None:
            found.append(torch.from_numpy(micro_batch.begun.token_ids.data.astype(np.int64)))
            continue
        embeddings = micro_batch.embeddings
        assert embeddings is not None  # the wire's rules
        attack = "nearest neighbour"
        found.append(nearest_tokens(embeddings.to(table.device), table).cpu())
    return FoundText(attack, found)


def score_tokens(attack: str, found: Sequence[Tensor], wanted: Sequence[Tensor], texts: int) -> Attack:
    """How many tokens are right; a guess that looks at nothing says the commonest token each time."""
    right = sum(int((a == b).sum()) for a, b in zip(found, wanted, strict=True))
    every = torch.cat(list(wanted))
    return share(attack, right, len(every), texts, "tokens", guess=commonest(every))


def audit_text(seen: Observed, truth: Truth, found: FoundText) -> Finding:
    """How many tokens are right."""
    true = truth.micro_batches[: len(found.ids)]
    texts = _distinct(true_texts(seen, truth, found))
    wanted = [torch.from_numpy(each.ids) for each in true]
    attack = score_tokens(found.attack, found.ids, wanted, texts)
    return found_by("text", [attack], "embeddings are rows of a public table")


def true_texts(seen: Observed, truth: Truth, found: FoundText) -> list[list[int]]:
    """Whole ones, as far as the attack looked."""
    return whole_texts([each.ids.tolist() for each in truth.micro_batches[: len(found.ids)]], seen.micro_batches)


def audit_prompt_lengths(seen: Observed, truth: Truth, found: FoundText) -> Finding:
    """Of how many texts an attacker knows where the answer begins."""
    true = truth.micro_batches[: len(found.ids)]
    if seen.has_only_first_blocks:
        return _prompt_lengths_of_first_blocks(seen, truth, found)
    pairs = [
        (guess, wanted)
        for micro_batch, each in zip(seen.micro_batches, true, strict=False)
        if len(each.labels)
        for guess, wanted in zip(
            first_labels(micro_batch.lengths, micro_batch.label_positions),
            first_labels(each.lengths.tolist(), each.label_positions.tolist()),
            strict=True,
        )
        if wanted is not None
    ]
    if not pairs:
        return nothing_there("prompt lengths", "no text has a prompt and an answer here")
    right = sum(guess == wanted for guess, wanted in pairs)
    texts = _distinct([text.tolist() for each in true if len(each.labels) for text in each.texts()])
    return found_by(
        "prompt lengths",
        [share("label positions as they are", right, len(pairs), texts, "prompts")],
        "the positions of labels cross as they are",
    )


def _prompt_lengths_of_first_blocks(seen: Observed, truth: Truth, found: FoundText) -> Finding:
    guesses = zip(common_marker_ends(found.texts(seen)), examples_of(truth), strict=False)
    pairs = {tuple(each.ids.tolist()): (guess, int(each.label_positions[0]) + 1) for guess, each in guesses if each}
    if not pairs:
        return nothing_there("prompt lengths", "no text has a prompt and an answer here")
    right = sum(guess == wanted for guess, wanted in pairs.values())
    attack = share("words that all texts have, in the text found", right, len(pairs), len(pairs), "prompts")
    return found_by("prompt lengths", [attack], "label positions do not cross; words that end every prompt do")


def audit_membership(seen: Observed, truth: Truth, found: FoundText) -> Finding:
    """Whether an attacker who has a text can tell that it was among those that crossed."""
    members, others = _candidates(true_texts(seen, truth, found), truth)
    if not members or not others:
        return nothing_there("membership", "there is no second text to compare with")
    texts = found.texts(seen)
    right = sum(is_member(each, texts) for each in members) + sum(not is_member(each, texts) for each in others)
    count = len(members) + len(others)
    return found_by(
        "membership",
        [share("the text found", right, count, count, "texts told apart", guess=0.5)],
        "who has the text knows whether another one was among it",
    )


def audit_phrase(seen: Observed, truth: Truth, found: FoundText, phrase: str) -> Finding:
    """Whether a phrase is found in the texts that have it."""
    texts = true_texts(seen, truth, found)
    has = [phrase in truth.text_of(text) for text in texts]
    secret = f"the phrase {phrase!r}"
    if not any(has):
        return nothing_there(secret, f"none of the texts that were attacked has it, the first {MOST_TOKENS:,} tokens")
    told = [phrase in truth.text_of(text) for text in found.texts(seen)]
    right = sum(a and b for a, b in zip(has, told, strict=True))
    count = _distinct([text for text, has_it in zip(texts, has, strict=True) if has_it])
    attack = share("a search in the text found", right, sum(has), count, "texts that have it")
    return found_by(secret, [attack])


def _distinct(texts: Sequence[Sequence[int]]) -> int:
    return len(set(map(tuple, texts)))


def examples_of(truth: Truth) -> list[TrueExample | None]:
    """Of each text that crossed the example of the data that it is the beginning of; None where there is none."""
    # A text crosses as far as its last label needs it; several may begin alike.
    needed = {each.ids[: each.label_positions[-1] + 1].tobytes(): each for each in truth.examples}
    whole = {each.ids.tobytes(): each for each in truth.examples}
    texts = (text.tobytes() for micro_batch in truth.micro_batches for text in micro_batch.texts())
    return [needed.get(text) or whole.get(text) for text in texts]


def _candidates(texts: Sequence[list[int]], truth: Truth) -> tuple[list[list[int]], list[list[int]]]:
    """Texts that crossed, and as many that did not: others of the data, or, where there are too few, made of the first
    half of one text that crossed and the second half of another."""
    crossed = {tuple(text): text for text in texts}
    lengths = set(map(len, crossed))
    members = list(crossed.values())[:MOST_CANDIDATES]
    examples = [each.ids.tolist() for each in truth.examples]
    others = [ids for ids in examples if not any(tuple(ids[:length]) in crossed for length in lengths)]
    made = [text for text in swap_ends(members) if text not in members]
    return members, [*others, *made][: len(members)]
