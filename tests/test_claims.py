"""No sentence of ours promises more than an attack has left standing: docs/log/benchmarks/audit.json has the verdicts.

A sentence that says that something is protected, hidden, private … must stand in a paragraph that names the findings
that it rests on, ``<!-- audit: trunk/adapter; trunk/gradients -->``. Sentences that deny it, or speak of something
else, are listed here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main

import dlora.cloud.commands.app
import dlora.edge.commands.app
import dlora.export.cli

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from audit import FILE, RECIPES, TRIED, TRIED_ON, defences_table, findings_table, in_one_sentence, of_few_tokens

ROOT = Path(__file__).parents[1]
AUDIT: dict[str, Any] = json.loads((ROOT / "docs" / "log" / FILE).read_text(encoding="utf-8"))
PAGES = [
    *ROOT.glob("*.md"),
    *(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "decisions" and page.stem != "experiments"),
]
CLAIM = re.compile(
    r"protect|privac|\bprivate\b|secre[ct]|unreadable|illegible|invisible|conceal|anonym|confidential|\bsafe(ly)?\b"
    r"|by construction|reveal|\bleaks?\b|unknown to|learns? nothing|\bresists?\b|no attack|unable to"
    r"|\bhid(e|es|den)\b(?! (states?|size|width))"
    r"|(cannot|can't) (be )?(see|seen|read|know|known|learn|tell|told|find|found|recover)",
    re.IGNORECASE,
)
STRONG = re.compile("by construction", re.IGNORECASE)
MARKER = re.compile(r"<!-- audit: ([^>]+) -->")
# What the words above also stand in: what denies a claim, and what is about something else.
NO_CLAIMS = (
    "not secrecy from the operator",
    "not secrecy from whoever runs it",
    "**No secrecy from the server's operator**",
    "hides nothing",
    "EXPOSED, PARTIAL, RESISTED or BY CONSTRUCTION",  # all there are
)


def sentences(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each sentence of a page, without code, and the findings that its paragraph names."""
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\| )", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)):
        named = [name.strip() for marker in MARKER.findall(paragraph) for name in marker.split(";")]
        for sentence in re.split(r"(?<=[.;:!?])\s+", MARKER.sub("", paragraph).replace("\n", " ")):
            yield sentence, named


def too_strong(text: str, audit: dict[str, Any], allowed: tuple[str, ...] = NO_CLAIMS) -> list[str]:
    """The sentences that claim more than the findings that they name."""
    found = []
    for sentence, named in sentences(text):
        rest = sentence
        for phrase in allowed:
            rest = rest.replace(phrase, "")
        if not CLAIM.search(rest):
            continue
        enough = ("BY CONSTRUCTION",) if STRONG.search(rest) else ("BY CONSTRUCTION", "RESISTED")
        if not named or any(verdict_of(name, audit) not in enough for name in named):
            found.append(sentence)
    return found


def verdict_of(name: str, audit: dict[str, Any]) -> str | None:
    """``recipe/secret``, or ``recipe/noise=1``."""
    recipe, _, secret = name.partition("/")
    of_recipe = audit.get(recipe, {"findings": {}, "defences": {}})
    finding = of_recipe["findings"].get(secret) or of_recipe["defences"].get(secret) or {"verdict": None}
    verdict: str | None = finding["verdict"]
    return verdict


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_claim_no_more_than_the_audit_found(page: Path) -> None:
    allowed = (*NO_CLAIMS, *OTHER_MATTERS.get(page.name, ()))
    text = page.read_text(encoding="utf-8").replace(findings_table(AUDIT), "").replace(defences_table(AUDIT), "")
    assert too_strong(text, AUDIT, allowed) == []


def test_every_exception_is_needed() -> None:
    texts = {page.name: " ".join(page.read_text(encoding="utf-8").split()) for page in PAGES}
    for page, phrases in OTHER_MATTERS.items():
        for phrase in phrases:
            assert " ".join(phrase.split()) in re.sub(r"`[^`]*`", "", texts[page]).replace("  ", " "), (page, phrase)


def helps() -> Iterator[str]:
    """All that ``--help`` says."""
    waiting: list[click.Command] = [
        typer.main.get_command(each)
        for each in (dlora.edge.commands.app.app, dlora.cloud.commands.app.app, dlora.export.cli.app)
    ]
    while waiting:
        command = waiting.pop()
        yield command.help or ""
        yield from (getattr(parameter, "help", None) or "" for parameter in command.params)
        waiting += getattr(command, "commands", {}).values()


def test_help_claims_no_more_than_the_audit_found() -> None:
    texts = list(helps())
    assert len(texts) > 200
    assert [line for text in texts for line in too_strong(text, AUDIT, (*NO_CLAIMS, *HELP))] == []


def test_where_text_is_said_not_to_be_transmitted_it_is_said_that_this_is_no_secrecy() -> None:
    for page in PAGES:
        for paragraph in page.read_text(encoding="utf-8").split("\n\n"):
            if "never transmitted" in " ".join(paragraph.split()):
                assert "not secrecy from" in " ".join(paragraph.split()), page


CLAIMS = """\
Activations are unreadable.
The cloud cannot see your data.
dlora is privacy-preserving.
Your labels are protected.
The server learns nothing of your labels.
No attack recovers the adapter.
It can't see your data.
What crosses is invisible to the server.
The default does not reveal the text.
int8 hides the text.
With the default the adapter is protected by construction. <!-- audit: bottleneck/adapter -->
The text is private. <!-- audit: trunk/text -->
The seed is safe by construction. <!-- audit: lora/seed -->
The text is protected. <!-- audit: no such recipe/text -->
Noise hides the text. <!-- audit: lora/noise=1 -->"""


@pytest.mark.parametrize("sentence", CLAIMS.splitlines())
def test_a_sentence_that_claims_too_much_is_found(sentence: str) -> None:
    assert too_strong(f"Something else.\n\n{sentence}\n\nMore.", AUDIT)


def test_a_sentence_that_rests_on_a_verdict_falls_with_it() -> None:
    text = "Of it the adapter is protected by construction. <!-- audit: trunk/adapter -->"
    assert too_strong(text, AUDIT) == []
    changed = json.loads(json.dumps(AUDIT))
    changed["trunk"]["findings"]["adapter"]["verdict"] = "PARTIAL"
    assert too_strong(text, changed)


def test_security_and_readme_quote_the_audit() -> None:
    security = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    assert findings_table(AUDIT) in security
    assert defences_table(AUDIT) in security
    assert of_few_tokens(AUDIT) in " ".join(security.split())
    assert in_one_sentence(AUDIT) in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_audit_is_whole() -> None:
    assert set(AUDIT) == set(RECIPES)
    here = [name for name, each in AUDIT[TRIED_ON]["defences"].items() if "commit" not in each]
    assert here == [f"noise={times_rms:g}" for times_rms in TRIED]
    for recipe in AUDIT.values():
        assert recipe["command"].startswith("python benchmarks/audit.py --only")
        for finding in (*recipe["findings"].values(), *recipe["defences"].values()):
            assert (finding["verdict"] in ("EXPOSED", "PARTIAL", "RESISTED")) == bool(finding["attacks"])


def test_what_the_lab_found_is_found_again() -> None:
    """The verdicts that must not change unnoticed; a change of one is news."""
    of_split = ("lora", "lora, int8", "bottleneck", "ffa")
    for recipe in of_split:
        findings = AUDIT[recipe]["findings"]
        assert findings["text"]["attacks"][0]["figure"] == 1
        assert findings["labels"]["attacks"][0]["figure"] > 0.99
    secrets = ("text", "labels", "adapter", "gradients", "prompt lengths", "membership")
    defences = ("noise=0.3", "noise=1", "first-blocks=1", "first-blocks=2", "first-blocks=4")
    verdicts = {
        **{f"{recipe}/{secret}": "EXPOSED" for recipe in of_split for secret in secrets},
        **{f"trunk/{secret}": "BY CONSTRUCTION" for secret in ("labels never fed back", "adapter", "gradients")},
        **dict.fromkeys(("trunk/labels fed back as text", "trunk/text", "lora, --seed 7/seed"), "EXPOSED"),
        "lora/seed": "RESISTED",
        **{f"lora/{defence}": "EXPOSED" for defence in defences},
    }
    assert {name: verdict_of(name, AUDIT) for name in verdicts} == verdicts
    for name in defences[2:]:
        attacks = {each["attack"]: each for each in AUDIT["lora"]["defences"][name]["attacks"]}
        assert attacks["sequential matching"]["figure"] == 1
        assert attacks["nearest neighbour"]["figure"] < 0.1


OTHER_MATTERS = {
    "SECURITY.md": (
        "a vulnerability in private, through",
        "an honest server has nothing to lose, leak, log or be asked for",
        "never payload, tokens or secrets",
    ),
    "protocol.md": ("C cannot read its tokens", "are told only to who holds the whole secret"),
    "keep-a-run-going.md": ("It is no secret and proves nothing",),
    "benchmarks.md": ("the model learns nothing of this set",),
    "kill-and-revive.md": ("of the last safe",),
    "bundle.md": ("hides from all, of zeros",),
    "run-a-server.md": ("the tokens cannot be read", "never payload, tokens or secrets"),
    "audit.md": ("| BY CONSTRUCTION |", "What each hides, and the loss"),
}
HELP = ("without their secrets",)
