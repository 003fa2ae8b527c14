"""An audit: every attack on a recording, and what it found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import msgspec
import torch

from dlora.cloud.model.base_model import BaseModel, find_embedding
from dlora.protocol.errors import DataError, DloraError, ModelMismatchError
from dlora.protocol.text import first_line
from dlora.protocol.version import SOFTWARE_VERSION

from .adapter import audit_adapter, audit_gradients
from .finding import Finding
from .labels import audit_labels
from .observed import Observed
from .scoring import Verdict
from .seed import audit_seed
from .side_channels import audit_lengths, in_the_clear
from .text import audit_membership, audit_phrase, audit_prompt_lengths, audit_text, find_text, true_texts
from .truth import Truth

AUDIT_FORMAT = 1
MOST_SHOWN = 40
ROUNDING = 0.02
"""Of a row's largest value: the wire's int8, and a table that a bundle holds in int8, are well within."""


class ShownText(msgspec.Struct, frozen=True):
    """A text that crossed, and what an attack made of it."""

    true: str
    found: str


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """All that an audit says; its JSON is what ``--json`` prints.

    Attributes:
        recorded: what was recorded, in words: purpose, kind, wire dtypes, sizes.
        clear: what crosses as it is.
        seconds: that it took.
    """

    format: int = AUDIT_FORMAT
    software: str = SOFTWARE_VERSION
    base_model: str
    base_fingerprint: str
    recorded: dict[str, str | int]
    findings: tuple[Finding, ...]
    clear: tuple[str, ...]
    texts: tuple[ShownText, ...]
    seconds: float


def run_audit(
    seen: Observed,
    truth: Truth,
    base: BaseModel,
    *,
    phrases: Sequence[str] = (),
    on_attack: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Attack everything. Raises ``ModelMismatchError``, and ``DataError`` for frames that no attack is made for.

    Args:
        phrases: that are looked for in the text found.
        on_attack: called with the name of each secret before it is attacked.
    """
    started = time.monotonic()
    if seen.welcome.base_fingerprint != base.fingerprint:
        raise ModelMismatchError(
            f"the frames are of another base model ({seen.welcome.base_model}) than {base.name}: give the one that the "
            "server ran"
        )
    seen = replace(seen, micro_batches=seen.micro_batches[: len(truth.micro_batches)])
    on_attack("text")
    with attacking("text"):
        found = find_text(seen, base)
        findings = [audit_text(seen, truth, found)]
    on_attack("labels")
    with attacking("labels"):
        findings += audit_labels(seen, truth, base, found)
    others: dict[str, Callable[[], Finding]] = {
        "adapter": lambda: audit_adapter(seen, truth),
        "gradients": lambda: audit_gradients(seen, truth),
        "prompt lengths": lambda: audit_prompt_lengths(seen, truth, found),
        "membership": lambda: audit_membership(seen, truth, found),
        "lengths of texts": lambda: audit_lengths(seen, truth),
        "seed": lambda: audit_seed(seen, truth),
    }
    for secret, attack in others.items():
        on_attack(secret)
        with attacking(secret):
            findings.append(attack())
    with attacking("text"):
        is_text = not seen.has_only_first_blocks or crossed_is_text(seen, truth, base)
    if not is_text:
        findings = [_not_by_construction(each) for each in findings]
    findings += [audit_phrase(seen, truth, found, phrase) for phrase in phrases]
    pairs = zip(true_texts(seen, truth, found), found.texts(seen), strict=True)
    shown = [ShownText(truth.text_of(a), truth.text_of(b)) for a, b in islice(pairs, MOST_SHOWN)]
    return Audit(
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        recorded=_recorded(seen),
        findings=tuple(findings),
        clear=tuple(in_the_clear(seen)),
        texts=tuple(shown),
        seconds=round(time.monotonic() - started, 2),
    )


@contextmanager
def attacking(what: str) -> Iterator[None]:
    """Whatever an attack raises, as ``DataError``: frames that whole messages are made of need not be a conversation,
    and a verdict must not come of what no attack was made for."""
    try:
        yield
    except (DloraError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            f"the attack on {what} fails on these frames ({type(error).__name__}: {first_line(error)}): they are not "
            "what a device and a server say to each other, or dlora has a bug; record them again"
        ) from None


def crossed_is_text(seen: Observed, truth: Truth, base: BaseModel) -> bool:
    """Whether all that was sent is these tokens, or their embeddings but for rounding: nothing is mixed in."""
    end = find_embedding(base)
    for crossed, true in zip(seen.micro_batches, truth.micro_batches, strict=True):
        ids, embeddings = torch.from_numpy(true.ids), crossed.embeddings
        if embeddings is None:
            assert crossed.begun.token_ids is not None
            if crossed.begun.token_ids.data.tolist() != true.ids.tolist():
                return False
            continue
        wanted = end(ids.to(base.device)).float().cpu()
        largest = wanted.abs().amax(1, keepdim=True).clamp_min(1e-30)
        if not bool(((embeddings - wanted).abs() <= ROUNDING * largest).all()):
            return False
    return True


def _not_by_construction(finding: Finding) -> Finding:
    if finding.verdict is not Verdict.BY_CONSTRUCTION:
        return finding
    why = "the embeddings that crossed are not those of the text: no attack here looks for what else is in them"
    return Finding(secret=finding.secret, verdict=Verdict.PARTIAL, why=why)


def _recorded(seen: Observed) -> dict[str, str | int]:
    opening = seen.opening
    modes = sorted({each.begun.mode for each in seen.micro_batches})
    recorded: dict[str, str | int] = {
        "purpose": type(opening.purpose).__name__.lower(),
        "micro_batches": len(seen.micro_batches),
        "modes": ", ".join(modes),
        "tokens": sum(each.begun.tokens for each in seen.micro_batches),
        "bytes": sum(each.nbytes for each in seen.frames),
        "wire_dtypes": ", ".join(sorted(set(msgspec.structs.asdict(opening.codecs).values()))),
    }
    if opening.groups:
        recorded |= {"kind": opening.adapter.kind, "rank": opening.adapter.r, "groups": len(opening.groups)}
    return recorded
