"""Adapter and gradients: which attacks are run on a recording, and how they are scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from dlora.protocol import messages as m

from .finding import Finding, by_construction, found_by, nothing_there
from .least_squares import choose_rows, product_from_both, product_from_few, product_from_forward, solve
from .observed import Observed, SeenMicroBatch, floats, joined
from .optimizer_replay import StepSeen, replay
from .scoring import Attack, matrices, relative_error
from .truth import Gradients, Parameters, Truth

NON_INTERFERENCE: Final = "tests/test_trunk.py::test_what_is_sent_depends_on_the_text_alone"
NOTHING_CROSSES: Final = (
    "nothing that crosses is computed from it; the server was asked for the first blocks' hidden states only, from "
    f"text and public weights, and that what is sent depends on the text alone is tested by {NON_INTERFERENCE}"
)
_NO_ADAPTER: Final = "no adapter exchanges with the server here; answers that are generated tell something of one"
MOST_ROWS: Final = 2048
MOST_GROUPS: Final = 32


@dataclass(frozen=True)
class _Version:
    """The micro-batches of a time in which what is trained did not change, the number of the last of them, and whether
    they have a backward pass."""

    micro_batches: list[SeenMicroBatch]
    last: int
    trains: bool

    def named(self, attack: str) -> str:
        """An attack's name, which says where it had no backward pass."""
        return attack if self.trains else f"{attack}, forward only"

    def with_group(self, group: int) -> list[SeenMicroBatch]:
        return [each for each in self.micro_batches if group in each.deltas and group in each.inputs]


def audit_adapter(seen: Observed, truth: Truth) -> Finding:
    """What is trained: products of A and B, cores, or B, times their scaling."""
    if seen.has_only_first_blocks:
        return by_construction("adapter", NOTHING_CROSSES)
    attacks = list(_handed_over(seen, truth))
    attack = _attack_lora if seen.opening.adapter.kind == "lora" else _attack_frozen_factors
    for version in _versions(seen, truth):
        attacks += attack(seen, version, _parameters_of(truth, version.last))
    if not attacks:
        return nothing_there("adapter", _NO_ADAPTER)
    why = "times its scaling; adapters are linear, and the server sees both their sides"
    return found_by("adapter", attacks, "; ".join(filter(None, (why, replay_is_missing(seen)))))


def audit_gradients(seen: Observed, truth: Truth) -> Finding:
    """The gradients of what is trained, of one step."""
    if seen.has_only_first_blocks:
        return by_construction("gradients", NOTHING_CROSSES)
    errors: list[float] = []
    for gradients in truth.gradients[-1:]:
        micro_batches = seen.micro_batches[gradients.first : gradients.end]
        errors += _gradient_errors(seen, micro_batches, gradients)
    if not errors:
        return nothing_there("gradients", "nothing is trained in this recording")
    return found_by(
        "gradients",
        [matrices("product of what crossed", errors, f"those of {len(errors)} groups")],
        "what crosses forward, times what crosses backward, is the gradient: of a lora that of B·A, which the "
        "truth's A and B turn into theirs",
    )


# -- of the kind lora ------------------------------------------------------------------------------------


def _attack_lora(seen: Observed, version: _Version, parameters: Parameters) -> Iterator[Attack]:
    rank = seen.opening.adapter.r
    both: list[float] = []
    few: list[float] = []
    forward: list[float] = []
    rows = fewest = 0
    for group, wanted in _some([each for each in _products(parameters) if version.with_group(each[0])]):
        micro_batches = version.with_group(group)
        inputs, deltas = _forward_rows(micro_batches, group)
        rows = max(rows, len(inputs))
        forward.append(relative_error(torch.cat(product_from_forward(inputs, deltas, rank)), wanted))
        backward = [each.input_grads[group] for each in micro_batches if group in each.input_grads]
        if backward:
            input_grads = joined(backward)[:MOST_ROWS]
            both.append(relative_error(torch.cat(product_from_both(inputs, deltas, input_grads, rank)), wanted))
            few.append(relative_error(torch.cat(product_from_few(inputs, deltas, input_grads, rank)), wanted))
            fewest = max(fewest, rank * len(deltas))
    if both:
        # The lowest group's input gradient does not cross: of it the server has the forward pass only.
        yield matrices("least squares, two-sided", both, f"B·A of {len(both)} groups, from {rows} tokens,")
        yield matrices("least squares, two-sided, few tokens", few, f"B·A of {len(few)} groups, from {fewest} tokens,")
    if forward:
        what = f"B·A of {len(forward)} groups, from {rows} tokens,"
        yield matrices(version.named("least squares, one-sided"), forward, what)


def _products(parameters: Parameters) -> Iterator[tuple[int, Tensor]]:
    """Of each group whose adapters have an effect: B·A of its target modules one under the other, scaled."""
    for group, (scale, named) in enumerate(zip(parameters.scales, parameters.groups, strict=True)):
        factors = [torch.from_numpy(values) for values in named.values()]
        product = scale * torch.cat([lora_b @ lora_a for lora_a, lora_b in _pairs(factors)])
        if bool(product.abs().max() > 0):
            yield group, product


def _some(groups: Sequence[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    """At most ``MOST_GROUPS``, evenly over the depth, the lowest and the highest among them."""
    count = min(MOST_GROUPS, len(groups))
    return [groups[round(index * (len(groups) - 1) / max(1, count - 1))] for index in range(count)]


def _pairs(factors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each target module, as ``AdapterKind.parameter_shapes`` orders them."""
    return list(zip(factors[::2], factors[1::2], strict=True))


# -- of kinds whose other factors the server holds -------------------------------------------------------


def _attack_frozen_factors(seen: Observed, version: _Version, parameters: Parameters) -> Iterator[Attack]:
    """Of ``bottleneck`` R, of ``ffa`` B: what the device computes is one matrix product."""
    what = "R" if seen.opening.adapter.kind == "bottleneck" else "B"
    rank = seen.opening.adapter.r
    solved: list[float] = []
    few: list[float] = []
    rows = 0
    wanted_of: dict[int, Tensor] = {}
    for group, (scale, named) in enumerate(zip(parameters.scales, parameters.groups, strict=True)):
        wanted = scale * torch.cat([torch.from_numpy(values) for values in named.values()])
        micro_batches = version.with_group(group)
        if not micro_batches or not bool(wanted.abs().max() > 0):
            continue
        wanted_of[group] = wanted
        inputs, deltas = _forward_rows(micro_batches, group)
        rows = max(rows, len(inputs))
        outputs = torch.cat(deltas, 1)
        solved.append(relative_error(solve(inputs, outputs), wanted))
        chosen = choose_rows(inputs, rank)
        few.append(relative_error(solve(inputs[chosen], outputs[chosen]), wanted))
    if solved:
        yield matrices(version.named("least squares"), solved, f"{what} of {len(solved)} groups, from {rows} tokens,")
        if rows > rank:
            name = version.named("least squares, few tokens")
            yield matrices(name, few, f"{what} of {len(few)} groups, from {rank} tokens,")
    if version.trains and (replayed := _replay(seen, version, wanted_of, what)):
        yield replayed


def _replay(seen: Observed, version: _Version, wanted_of: dict[int, Tensor], what: str) -> Attack | None:
    """What a server finds that steps the optimiser itself; None where it did not see the run from its first step on."""
    at = version.micro_batches[-1].step
    if not wanted_of or not at or replay_is_missing(seen):
        return None
    steps = [_step_seen(seen, step) for step in range(at + 1)]
    values = replay(steps).values
    errors = [relative_error(values[str(group)], wanted) for group, wanted in wanted_of.items() if str(group) in values]
    if not errors:
        return None
    return matrices("replay of the optimiser", errors, f"{what} of {len(errors)} groups, from {at} steps' gradients,")


def replay_is_missing(seen: Observed) -> str:
    """Why the optimiser cannot be replayed, where what is trained began at zero; empty where it can."""
    purpose = seen.openings[0].purpose
    if not isinstance(purpose, m.Train) or seen.opening.adapter.kind == "lora":
        return ""
    last = max(each.step for each in seen.micro_batches)
    trained = {each.step for each in seen.micro_batches if each.grads}
    if purpose.next_step or purpose.learnt or not trained >= set(range(last)):
        return "the replay of the optimiser was not tried, because the recording does not have the run's first steps"
    return ""


def _step_seen(seen: Observed, step: int) -> StepSeen:
    """A step that was run again, because its session was lost or a learning rate was found by it, counts as it was run
    last."""
    last: dict[tuple[str, int], SeenMicroBatch] = {}
    mode = ""
    for each in seen.micro_batches:
        if each.step == step and each.deltas:
            if each.begun.mode == "train" != mode and any(key[0] == "train" for key in last):
                last.clear()  # evaluations in between were of updates that were taken back
            mode = each.begun.mode
            last[mode, each.begun.micro_batch] = each
    rows, grads = {}, {}
    for group in sorted({group for each in last.values() for group in each.deltas}):
        forward = [each for each in last.values() if group in each.deltas]
        inputs, deltas = _forward_rows(forward, group)
        rows[str(group)] = inputs, torch.cat(deltas, 1)
        trained = [each for each in forward if group in each.grads]
        if trained:
            grads[str(group)] = _gradient_product(trained, group)
    return StepSeen(rows, grads)


# -- both ------------------------------------------------------------------------------------------------


def _handed_over(seen: Observed, truth: Truth) -> Iterator[Attack]:
    """``--kr-on-kill give_to_server`` sends what was learnt as it is."""
    errors = []
    for group, (given, begun) in seen.given.items():
        parameters = _parameters_of(truth, begun)
        scale = parameters.scales[group]
        wanted = [  # the scaling is in what is nearest to the output
            torch.from_numpy(values) * (1.0 if name.endswith(".lora_A") else scale)
            for name, values in parameters.groups[group].items()
        ]
        if all(bool((each != 0).any()) for each in wanted):
            found = [floats(tensor) for tensor in given.tensors]
            pairs = zip(found, wanted, strict=True)
            errors.append(max(relative_error(a, b) for a, b in pairs))
    if errors:
        yield matrices("handed over as it is", errors, f"parameters of {len(errors)} groups")


def _gradient_errors(seen: Observed, micro_batches: Sequence[SeenMicroBatch], gradients: Gradients) -> list[float]:
    """Of each group that is trained, the relative error of the gradients that what crossed gives."""
    errors = []
    parameters = gradients.parameters
    for group, (scale, named) in enumerate(zip(parameters.scales, parameters.groups, strict=True)):
        trained = [each for each in micro_batches if group in each.grads and group in each.inputs]
        if not trained or not all(name in gradients.values for name in named):
            continue
        product = _gradient_product(trained, group)
        found = [scale * product]
        if seen.opening.adapter.kind == "lora":
            # The product is the gradient of scaling · B A. That of A and of B is seen through the other one, which
            # scoring takes from the truth: the server knows B A only, whose factors are known but for an r x r matrix.
            pairs = _pairs([torch.from_numpy(values) for values in named.values()])
            found = []
            of_targets = product.split([len(lora_b) for _, lora_b in pairs])
            for of_target, (lora_a, lora_b) in zip(of_targets, pairs, strict=True):
                found += [scale * lora_b.T @ of_target, scale * of_target @ lora_a.T]
        wanted = torch.cat([torch.from_numpy(gradients.values[name]).flatten() for name in named])
        if bool(wanted.abs().max() > 0):
            errors.append(relative_error(torch.cat([each.flatten() for each in found]), wanted))
    return errors


def _versions(seen: Observed, truth: Truth) -> list[_Version]:
    """The last time in which adapters that have an effect trained, and the last in which they were only used."""
    found: dict[bool, _Version] = {}
    for step in sorted({each.step for each in seen.micro_batches}, reverse=True):
        for trains in (True, False):
            same = [
                (index, each)
                for index, each in enumerate(seen.micro_batches)
                if each.step == step and each.deltas and bool(each.grads) == trains
            ]
            if same and trains not in found and _has_effect(_parameters_of(truth, same[-1][0])):
                found[trains] = _Version([each for _, each in same], same[-1][0], trains)
    return list(found.values())


def _has_effect(parameters: Parameters) -> bool:
    return any(
        scale > 0 and all(bool((values != 0).any()) for values in named.values())
        for scale, named in zip(parameters.scales, parameters.groups, strict=True)
    )


def _parameters_of(truth: Truth, micro_batch: int) -> Parameters:
    """What was trained when a micro-batch began."""
    return [each for each in truth.parameters if each.micro_batch <= micro_batch][-1]


def _forward_rows(micro_batches: Sequence[SeenMicroBatch], group: int) -> tuple[Tensor, list[Tensor]]:
    """What went in, (rows, in), and what came out, (rows, out) of each target module."""
    inputs = joined(each.inputs[group] for each in micro_batches)
    targets = range(len(micro_batches[0].deltas[group]))
    outputs = [joined(each.deltas[group][index] for each in micro_batches) for index in targets]
    return inputs[:MOST_ROWS], [output[:MOST_ROWS] for output in outputs]


def _gradient_product(micro_batches: Sequence[SeenMicroBatch], group: int) -> Tensor:
    """What crosses backward times what crosses forward, summed: (out of all target modules, in)."""
    products = [
        torch.cat([floats(grad) for grad in each.grads[group]], 1).T @ floats(each.inputs[group])
        for each in micro_batches
    ]
    return torch.stack(products).sum(0)
