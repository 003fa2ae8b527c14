"""Tokens are chosen as transformers' ``generate`` chooses them, from one number a token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from dlora.edge.generation.drafts import Drafting, Step, look_up_draft
from dlora.edge.generation.sampling import Sampler, Sampling
from dlora.edge.model.extension import Extension
from dlora.edge.model.measured_drafts import MeasuredDrafts
from dlora.protocol.errors import DataError, UsageError
from dlora.protocol.messages import MAX_DRAFT

VOCABULARY = 50
PROMPT = [3, 7, 7, 9]


def logits_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, VOCABULARY).astype(np.float32)


def probabilities_of_transformers(sampling: Sampling, logits: np.ndarray, before: list[int]) -> np.ndarray:
    penalty, top_k, top_p, min_p = sampling.repetition_penalty, sampling.top_k, sampling.top_p, sampling.min_p
    steps = transformers.LogitsProcessorList()
    if penalty != 1.0:
        steps.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    steps.append(transformers.TemperatureLogitsWarper(sampling.temperature))
    if top_k:
        steps.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        steps.append(transformers.TopPLogitsWarper(top_p))
    if min_p:
        steps.append(transformers.MinPLogitsWarper(min_p))
    return steps(torch.tensor([before]), torch.from_numpy(logits)[None]).softmax(-1)[0].double().numpy()


@pytest.mark.parametrize("settings", [
    {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.5, "top_p": 0.95},
], ids=lambda settings: " ".join(settings))  # fmt: skip
def test_tokens_have_the_probabilities_that_transformers_gives_them(settings: dict[str, float]) -> None:
    """Over many seeds; and a token that is left out there never comes."""
    logits = logits_of(1)
    wanted = probabilities_of_transformers(Sampling(**settings), logits, PROMPT)  # type: ignore[arg-type]
    draws = 4000
    counts = np.zeros(VOCABULARY)
    for seed in range(draws):
        sampling = Sampling(**settings, seed=seed)  # type: ignore[arg-type]
        counts[Sampler(sampling, PROMPT).choose(logits).token] += 1
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(wanted))
    spread = np.sqrt(wanted * (1 - wanted) / draws)
    assert (np.abs(counts / draws - wanted) <= 5 * spread + 1e-9).all()  # the seeds are fixed


def test_greedy_takes_the_likeliest_after_penalties() -> None:
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[7, 20]] = 2.0, 1.5
    assert Sampler(Sampling(), PROMPT).choose(logits).token == 7
    assert Sampler(Sampling(repetition_penalty=1.5), PROMPT).choose(logits).token == 20
    # OpenAI's penalties are of what was answered, not of what was asked.
    sampler = Sampler(Sampling(presence_penalty=1.0), PROMPT)
    assert [sampler.choose(logits).token for _ in range(3)] == [7, 20, 7]
    sampler = Sampler(Sampling(frequency_penalty=0.4), PROMPT)
    assert [sampler.choose(logits).token for _ in range(4)] == [7, 7, 20, 7]
    assert Sampler(Sampling(logit_bias={7: -100, 10**9: 5}), PROMPT).choose(logits).token == 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen(temperature: float) -> None:
    allowed = np.zeros(VOCABULARY, np.bool_)
    with pytest.raises(DataError, match="no token can come next"):
        Sampler(Sampling(temperature=temperature), PROMPT).choose(logits_of(0), allowed)
    allowed[[4, 5]] = True
    for seed in range(50):
        sampler = Sampler(Sampling(temperature=temperature, seed=seed), PROMPT)
        assert sampler.choose(logits_of(seed), allowed).token in (4, 5)


@pytest.mark.parametrize("temperature", [1e-6, 1e-307, 1e-310, 5e-324])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    logits = logits_of(4)
    for seed in range(20):
        sampler = Sampler(Sampling(temperature=temperature, seed=seed), PROMPT)
        assert sampler.choose(logits).token == logits.argmax()


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(3)
    choice = Sampler(Sampling(temperature=0.5, top_k=1, logprobs=4), PROMPT).choose(logits)
    wanted = torch.from_numpy(logits).double().log_softmax(-1)
    assert choice.logprob == pytest.approx(wanted[choice.token].item())
    top = wanted.topk(4)
    assert [token for token, _ in choice.top] == top.indices.tolist()
    assert [logprob for _, logprob in choice.top] == pytest.approx(top.values.tolist())


def test_a_token_depends_on_the_seed_and_its_place_only() -> None:
    sampling = Sampling(temperature=1.0, seed=5)
    first, second = Sampler(sampling, PROMPT), Sampler(sampling, [1])
    tokens = [first.choose(logits_of(index)).token for index in range(20)]
    assert tokens == [second.choose(logits_of(index)).token for index in range(20)]
    unseeded = {Sampler(Sampling(temperature=1.0), PROMPT).choose(np.zeros(50_000)).token for _ in range(4)}
    assert len(unseeded) > 1


@pytest.mark.parametrize(("setting", "value"), [
    ("temperature", -1), ("top_p", 1.5), ("top_p", 0.0), ("min_p", -0.1), ("repetition_penalty", 0.0),
    ("top_k", -1), ("top_k", 10**400), ("seed", 10**400), ("logprobs", 21), ("seed", -1), ("temperature", float("nan")),
])  # fmt: skip
def test_settings_that_make_no_sense_are_named(setting: str, value: float) -> None:
    with pytest.raises(UsageError, match=setting):
        Sampling(**{setting: value})


# -- drafts -------------------------------------------------------------------------------------------------


def drafted(ids: list[int], most: int) -> list[int]:
    return look_up_draft(np.array(ids, np.int64), most).tolist()


def test_a_draft_is_what_followed_the_same_tokens() -> None:
    assert drafted([1, 2, 3, 4, 5, 1, 2], 3) == [3, 4, 5]
    assert drafted([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 2) == [4, 8]  # the last time counts
    assert drafted([7, 1, 2, 3, 5, 9, 1, 2, 4, 7, 1, 2], 1) == [3]  # and a longer match more than a later one
    assert drafted([5, 5, 5], 4) == [5]  # no further than what is known
    assert drafted([1, 2, 3], 4) == drafted([1], 4) == drafted([1, 2, 1, 2], 0) == []


def test_drafts_are_as_long_as_they_pay() -> None:
    """Of either kind: a step of so many seconds, and 9 ms for each token."""
    for by in ("prompt", "server"):
        slow, quick, hopeless = (Drafting(MeasuredDrafts(), by=by) for _ in range(3))
        for _ in range(40):
            for drafting, step_s, hits in ((slow, 1.0, True), (quick, 0.01, True), (hopeless, 1.0, False)):
                observe(drafting, by, 0, 0, step_s)
                observe(drafting, by, 4, 4 if hits else 0, step_s)
        assert length(slow, by) == MAX_DRAFT  # over a slow network a token more costs nothing
        assert 0 < length(quick, by) < MAX_DRAFT
        seldom = length(hopeless, by)
        assert seldom < 4
        for _ in range(200):  # what was learnt of another part of the text fades
            observe(hopeless, by, 0, 0, 1.0)
        assert length(hopeless, by) > seldom
        assert length(Drafting(MeasuredDrafts(), by=by, length=3), by) == 3


def test_drafts_come_from_whoever_gives_more() -> None:
    drafting = Drafting(MeasuredDrafts())
    for _ in range(40):
        observe(drafting, "server", 4, 0, 1.0)
        observe(drafting, "prompt", 4, 4, 1.0)
    assert length(drafting, "prompt") == MAX_DRAFT
    for _ in range(80):
        observe(drafting, "server", 4, 4, 1.0)
        observe(drafting, "prompt", 4, 0, 1.0)
    assert length(drafting, "prompt") == 0
    assert length(drafting, "server") == MAX_DRAFT


def test_nothing_comes_ahead_where_another_token_is_mostly_chosen() -> None:
    """Where guesses take time: else nothing is lost."""
    greedy, drawn = Drafting(MeasuredDrafts()), Drafting(MeasuredDrafts(), is_greedy=False)
    assert greedy.first(20).guesses.ahead is not None
    for drafting in (greedy, drawn):
        for hit in [False] * 20:
            found = Extension(np.zeros((1, 2), np.float32), drafts=(1, 2), drafts_s=1.0)
            drafting.next(np.arange(9), 20, expects=8 if hit else 7)
            drafting.observe(Step(np.zeros(0, np.int64)), found, [1, 2, 3], 1.2)
        assert drafting.next(np.arange(9), 20).guesses.ahead is None
    assert (
        Drafting(MeasuredDrafts(), by="prompt").first(20).guesses
        == Drafting(MeasuredDrafts(), by="off").next(np.arange(9), 20).guesses
        == (0, None)
    )


REPEATED = np.array([*range(20), *range(20), 0, 1], np.int64)


def observe(drafting: Drafting, by: str, drafted: int, accepted: int, step_s: float) -> None:
    """A step with so many drafted tokens, each of which takes 9 ms."""
    drafts_s, logits = drafted * 0.009, np.zeros((1, 2), np.float32)
    chosen = [*range(accepted), -1]
    if by == "prompt":
        drafting._looked_up = np.arange(drafted)
        drafting.observe(Step(np.arange(drafted)), Extension(logits), chosen, step_s + drafts_s)
    else:
        drafting._looked_up = np.arange(0)
        found = Extension(logits, drafts=tuple(range(drafted)), drafts_s=drafts_s)
        drafting.observe(Step(np.zeros(0, np.int64)), found, chosen, step_s + drafts_s)


def length(drafting: Drafting, by: str) -> int:
    """Of the next draft of this kind, in a text in which everything repeats."""
    step = drafting.next(REPEATED, 64)
    return len(step.looked_up) if by == "prompt" else step.guesses.drafts
