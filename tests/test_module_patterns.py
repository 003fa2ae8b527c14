"""Patterns of strangers' adapters: as PEFT matches them, and never slowly."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft.utils.other import get_pattern_key

from dlora.protocol.errors import CheckpointError
from dlora.protocol.module_patterns import check_matching_time, first_match, read_patterns

HERE = Path("adapter")
NAMES = [
    f"{prefix}{block}.{module}"
    for prefix in ("model.layers.", "layers.", "model.decoder.layers.", "base.model.layers.")
    for block in (0, 1, 2, 11, 20)
    for module in ("self_attn.q_proj", "self_attn.qq_proj", "self_attn.v_proj", "mlp.down_proj", "encoder_attn.k_proj")
] + ["q_proj", "xq_proj", "q_projx", "model", "lm_head", ".q_proj", "q_proj.", "a.a.ab", "aab", "ab", "model-1.a_b"]
ALLOWED = [
    "q_proj", "model.layers.0.self_attn.q_proj", r"model\.layers\.0\.self_attn\.q_proj",
    "layers.1.self_attn.v_proj", "^model.decoder.layers.0.encoder_attn.k_proj", "^layers.0.self_attn.q_proj",
    "^layers.0.self_attn.q_proj$", "q_proj$", "^q_proj", "^", "$", "^$", "", "|", ".", "..", r"\.", r"\..", r".\.",
    ".*", "^.*", ".*$", ".*.*", r".*\.", r"\..*", "..*", r".*\.2\..*v_proj", r".*down_proj", ".*self_attn.*",
    "^.*self_attn.*proj", "self_attn.*", "layers.*q_proj", "^model.layers.*", "layers.*1.*proj", ".*q.*q.*",
    "a.*ab", "a.*a.*b", "a.*aab", "^a.*ab", ".*.*.*b", "q_proj|v_proj", "q_proj|^layers.2.*|down_proj$",
    "^q_proj|xq_proj", r".*\.[0-9]\..*q_proj", "layers.[0-9].mlp.down_proj", r"layers\.[0-9][0-9]\..*",
    "^model.layers.[1-2]..*", r"layers\.[0-1]\.self_attn\..*|lm_head", "model-1.a_b", "a_.*",
]  # fmt: skip
REFUSED = [
    "(?x:(a|aa) +b)", "(a|aa)+b", "(?:a|a)*b", "(a|a)*b", "(?i:a)", "(?i)a", "a{1,99}", "a{4294967296}", r"\d+",
    r"\w", r"\b", r"\Z", "(?P<x>a)(?P=x)", "(a)", "(q|v)_proj", "(", ")", "[", "[ab]", "[^.]", "[0-9]+", "[0-9]*",
    "[0-9]{2}", "[5-1]", "a?", "a+", "a*", ".+", ".?", ".*?", ".*+", ".**", r"\.*", r"\\.", "\\", "*", "a b",
    "a\nb", "a#b", "é", "a^b", "a$b", "$^", "^^", "a?a?a?a?a?", "x" * 1025,
]  # fmt: skip


@pytest.mark.parametrize("pattern", ALLOWED)
def test_patterns_match_as_peft_matches_them(pattern: str) -> None:
    found = read_patterns(HERE, {"rank_pattern": {pattern: 8}}, "rank_pattern")
    for name in NAMES:
        theirs = get_pattern_key([pattern], name)
        assert first_match(found, name) == (pattern if theirs == pattern else None), name


def test_the_first_pattern_that_matches_counts() -> None:
    patterns = [".*q_proj", "v_proj|down_proj", "model.layers.1.mlp.down_proj", "^layers.*", ".*"]
    found = read_patterns(HERE, {"alpha_pattern": dict.fromkeys(patterns, 2)}, "alpha_pattern")
    assert [first_match(found, name) for name in NAMES] == [get_pattern_key(patterns, name) for name in NAMES]


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_more_than_names_is_refused(pattern: str) -> None:
    with pytest.raises(CheckpointError, match="name the modules instead") as caught:
        read_patterns(HERE, {"rank_pattern": {"q_proj": 8, pattern: 8}}, "rank_pattern")
    assert str(caught.value).isprintable()


def test_alternatives_count_as_patterns() -> None:
    with pytest.raises(CheckpointError, match="has 5120 patterns"):
        read_patterns(
            HERE,
            {"rank_pattern": {f"{at}{'|' * 1020}": 1 for at in range(5)} | {"q" * at: 1 for at in range(1, 16)}},
            "rank_pattern",
        )


def test_as_many_patterns_as_modules_are_no_matter_and_hostile_ones_are() -> None:
    """PEFT writes a pattern a module; the limit is of what hostile ones would look at, and they are no slower."""
    names = [f"model.layers.{block}.self_attn.{module}_proj" for block in range(128) for module in "abcdefg"]
    read = read_patterns(HERE, {"rank_pattern": dict.fromkeys(names, 4)}, "rank_pattern")
    check_matching_time(HERE, list(read.values()), names)
    assert first_match(read, names[-1]) == names[-1]
    (slowest,) = read_patterns(HERE, {"rank_pattern": {".*" * 7 + "." * 120 + "x.*y": 4}}, "rank_pattern").values()
    assert not any(each.matches("." * 256) for each in slowest)  # a minute and more for ``re``
    check_matching_time(HERE, [slowest], names)
    with pytest.raises(CheckpointError, match="name the modules"):
        check_matching_time(HERE, [slowest] * 1000, names)
    for hostile in ({"x.*" * 9: 4}, {f"{number}{'x' * 1000}": 4 for number in range(300)}):  # slow to compile
        with pytest.raises(CheckpointError, match=r"may be slow to match|262,144 characters in all"):
            read_patterns(HERE, {"rank_pattern": hostile}, "rank_pattern")
