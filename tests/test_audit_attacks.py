"""Each attack on a planted case that it must solve, and on one that it must not: else a verdict says nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dlora.cloud.audit.least_squares import product_from_both, product_from_few, product_from_forward, solve
from dlora.cloud.audit.membership import is_member, swap_ends
from dlora.cloud.audit.observed import SeenFrame
from dlora.cloud.audit.optimizer_replay import StepSeen, replay
from dlora.cloud.audit.prompt_ends import common_marker_ends, first_labels
from dlora.cloud.audit.scoring import Verdict, matrices, relative_error, share, wilson
from dlora.cloud.audit.side_channels import answer_seconds, rows_from_size
from dlora.protocol.frames import frame_bytes
from dlora.protocol.wire_codecs import decode_floats, encode_floats

WIDTH, RANK = 48, 4


def crossed(values: Tensor, dtype: str = "fp16") -> Tensor:
    """As the wire leaves them."""
    return torch.from_numpy(decode_floats(encode_floats(values.numpy(), dtype)).copy())


class Exchange:
    """One group of two target modules: what crosses of so many tokens, forward and backward."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.products = [
            torch.randn(out, RANK, generator=draw) @ torch.randn(RANK, WIDTH, generator=draw) for out in (40, 24)
        ]
        x = torch.randn(rows, WIDTH, generator=draw)
        grads = [torch.randn(rows, len(product), generator=draw) for product in self.products]
        self.x = crossed(x)
        self.deltas = [crossed(self.x @ product.T) for product in self.products]
        self.input_grads = crossed(sum(grad @ product for grad, product in zip(grads, self.products, strict=True)))

    @property
    def wanted(self) -> Tensor:
        return torch.cat(self.products)


# -- least squares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2 * RANK, 3 * RANK, WIDTH])
def test_two_sided_least_squares_find_a_product_from_as_many_tokens_as_the_rank(rows: int) -> None:
    seen = Exchange(rows)
    found = torch.cat(product_from_both(seen.x, seen.deltas, seen.input_grads, RANK))
    assert relative_error(found, seen.wanted) < 0.02


def test_few_tokens_are_chosen_well() -> None:
    seen = Exchange(60)
    found = torch.cat(product_from_few(seen.x, seen.deltas, seen.input_grads, RANK))
    assert relative_error(found, seen.wanted) < 0.02


def test_two_sided_least_squares_do_not_find_a_product_from_fewer_tokens_or_of_other_gradients() -> None:
    seen, other = Exchange(RANK), Exchange(WIDTH, seed=1)
    assert relative_error(torch.cat(product_from_both(seen.x, seen.deltas, seen.input_grads, RANK)), seen.wanted) > 0.3
    seen = Exchange(2 * RANK)
    found = torch.cat(product_from_both(seen.x, seen.deltas, other.input_grads[: 2 * RANK], RANK))
    assert relative_error(found, seen.wanted) > 0.5


def test_one_sided_least_squares_need_as_many_tokens_as_the_input_is_wide() -> None:
    enough, few = Exchange(WIDTH + 8), Exchange(WIDTH // 2)
    assert relative_error(torch.cat(product_from_forward(enough.x, enough.deltas, RANK)), enough.wanted) < 0.02
    assert relative_error(torch.cat(product_from_forward(few.x, few.deltas, RANK)), few.wanted) > 0.5


def test_a_core_is_solved_from_as_many_tokens_as_the_rank_and_not_from_fewer() -> None:
    draw = torch.Generator().manual_seed(2)
    core, u = torch.randn(16, 16, generator=draw), torch.randn(40, 16, generator=draw)
    y = crossed(u @ core.T)
    assert relative_error(solve(u[:17], y[:17]), core) < 0.05
    assert relative_error(solve(u[:8], y[:8]), core) > 0.4
    with torch.random.fork_rng():
        assert relative_error(solve(u, y[torch.randperm(40, generator=draw)]), core) > 0.5  # rows of other tokens


# -- replay of the optimiser -----------------------------------------------------------------------------


def trained_steps(steps: int, *, hide: bool = False, start: float = 0.0) -> tuple[list[StepSeen], Tensor]:
    """AdamW of torch on a core that begins at ``start``, with a schedule and weight decay; six tokens a step.

    ``hide``: the server sees gradients of other tokens.
    """
    draw = torch.Generator().manual_seed(3)
    core = torch.nn.Parameter(start * torch.randn(16, 16, generator=draw))
    optimizer = torch.optim.AdamW([core], lr=1.0, weight_decay=0.5)
    seen = []
    for step in range(steps):
        u, g = (torch.randn(6, 16, generator=draw) for _ in range(2))
        before = core.detach().clone()
        shown = torch.randn(6, 16, generator=draw) if hide else g
        seen.append(StepSeen({"core": (u, crossed(u @ before.T, "int8"))}, {"core": shown.T @ u}))
        core.grad = g.T @ u
        torch.nn.utils.clip_grad_norm_([core], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 8e-3 * (1 - step / steps)
        optimizer.step()
    return seen, before


def test_the_optimiser_is_replayed_from_fewer_tokens_than_the_rank() -> None:
    seen, wanted = trained_steps(8)
    replayed = replay(seen)
    assert relative_error(replayed.values["core"], wanted) < 0.02
    assert replayed.residual < 0.02


def test_a_replay_fails_without_the_gradients_or_the_beginning() -> None:
    for seen, wanted in (trained_steps(8, hide=True), trained_steps(8, start=0.1)):
        replayed = replay(seen)
        assert relative_error(replayed.values["core"], wanted) > 0.5
        assert replayed.residual > 0.3


# -- what follows from the text --------------------------------------------------------------------------


def test_membership_is_told_from_texts_with_some_tokens_wrong_and_not_from_others() -> None:
    rng = np.random.default_rng(0)
    texts = rng.integers(0, 100, (20, 30)).tolist()
    damaged = [[*text[:10], 101, *text[11:]] for text in texts]
    assert all(is_member(text, damaged) for text in texts)
    assert all(is_member(text, [each[:20] for each in texts]) for text in texts)  # cut after its last label
    others = [*rng.integers(0, 100, (20, 30)).tolist(), *swap_ends(texts)]
    assert not any(is_member(text, damaged) for text in others)
    assert not is_member(texts[0], [rng.integers(0, 100, 30).tolist()])
    assert not is_member(texts[0], [texts[0][:3]])


def test_prompts_end_where_a_template_does() -> None:
    rng = np.random.default_rng(1)
    prompts = [[1, 2, *rng.integers(10, 99, length).tolist(), 3, 4, 5] for length in (3, 8, 5, 6, 4)]
    texts = [[*prompt, *rng.integers(10, 99, 7).tolist()] for prompt in prompts]
    assert common_marker_ends(texts) == [len(prompt) for prompt in prompts]


def test_prompts_without_a_common_end_are_not_told() -> None:
    rng = np.random.default_rng(1)
    texts = [rng.integers(10, 10_000, 20).tolist() for _ in range(5)]
    assert common_marker_ends(texts) == [None] * 5
    same_beginning = [[7, 8, *text] for text in texts]
    assert common_marker_ends(same_beginning) == [2] * 5  # a guess, and a wrong one


def test_first_labels_are_counted_from_their_own_sequence() -> None:
    assert first_labels([4, 3, 5], [2, 3, 8, 9]) == [2, None, 1]


# -- sizes and times -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "sequences", "labels"), [(1, 1, 0), (80, 4, 20), (512, 16, 100)])
def test_tokens_are_told_from_a_size_and_not_where_sizes_are_padded(tokens: int, sequences: int, labels: int) -> None:
    row = 576 * 2
    size = frame_bytes(1, [tokens * row, 4 * sequences, 4 * labels])
    assert rows_from_size(size, row, labels) == tokens
    assert rows_from_size(1 << 20, row, labels) != tokens  # every frame as large as the largest


def test_answers_are_timed() -> None:
    frames = [SeenFrame(0.0, True, 1), SeenFrame(1.0, False, 1), SeenFrame(1.5, True, 1), SeenFrame(9.0, True, 1)]
    assert list(answer_seconds(frames)) == [0.5]
    assert list(answer_seconds(frames[2:])) == []


# -- verdicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "of", "texts", "guess", "verdict"),
    [
        (300, 300, 20, 0.05, Verdict.EXPOSED),
        (271, 300, 20, 0.05, Verdict.EXPOSED),
        (150, 300, 20, 0.05, Verdict.PARTIAL),
        (3, 300, 20, 0.05, Verdict.RESISTED),
        (3, 300, 5, 0.05, Verdict.PARTIAL),  # five texts are too few to say more
        (20, 40, 40, 0.5, Verdict.PARTIAL),
        (100, 200, 200, 0.5, Verdict.RESISTED),
        (200, 200, 200, 0.5, Verdict.EXPOSED),
    ],
)
def test_verdicts_of_shares(right: int, of: int, texts: int, guess: float, verdict: Verdict) -> None:
    attack = share("attack", right, of, texts, "tokens", guess=guess)
    assert attack.verdict is verdict
    assert attack.interval[0] <= attack.figure <= attack.interval[1]


def test_verdicts_of_matrices() -> None:
    assert matrices("attack", [0.001, 0.002, 0.9], "A").verdict is Verdict.EXPOSED
    assert matrices("attack", [0.9, 0.8, 0.7], "A").verdict is Verdict.PARTIAL
    # With more tokens they are solved; and what is no number is nothing found, not something that resisted.
    assert matrices("attack", [1.0, 1.2, 0.99], "A").verdict is Verdict.PARTIAL
    assert matrices("attack", [math.nan, math.nan, 0.001], "A").verdict is Verdict.PARTIAL


def test_intervals_are_wilsons() -> None:
    low, high = wilson(0.5, 10)  # as in the article that ``share`` names
    assert math.isclose(low, 0.2366, abs_tol=1e-4)
    assert math.isclose(high, 0.7634, abs_tol=1e-4)
    assert wilson(0.0, 0) == (0.0, 1.0)
