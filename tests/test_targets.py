"""Which modules of a bundle are trained: names as PEFT reads them, blocks, and the order in which groups run."""

from __future__ import annotations

import random

import msgspec
import pytest
from families import FAMILIES, MORE_FAMILIES
from tiny import TinyFactory

from dlora.protocol.errors import UsageError
from dlora.protocol.groups import GroupSpec, TargetSpec, group_units, without_gains
from dlora.protocol.manifest import AdapterDefaults, Manifest, load_manifest
from dlora.protocol.targets import choose_groups, groups_of, module_names, number_ranges, spread

FUSED = "layers.{}.attention.qkv"


@pytest.fixture(scope="module")
def llama(tiny: TinyFactory) -> Manifest:
    return load_manifest(tiny().bundle)


def names_of(groups: tuple[GroupSpec, ...]) -> list[str]:
    return [target.name for group in groups for target in group.targets]


def test_bundle_lists_all_trainable_modules(tiny: TinyFactory, llama: Manifest) -> None:
    base = tiny().base
    assert llama.groups == choose_groups(llama, ["all-linear"])
    assert without_gains(llama.groups) == base.groups(base.targets)
    assert llama.defaults == AdapterDefaults(4, 8.0, ("q_proj", "v_proj"))
    wanted = {(group.in_features, target.out_features) for group in llama.groups for target in group.targets}
    assert {graph.key for graph in llama.graphs if graph.kind == "adapter_forward"} == {f"{i}x{o}" for i, o in wanted}


def test_default_target_modules_are_chosen(llama: Manifest) -> None:
    groups = choose_groups(llama)
    assert groups == choose_groups(llama, ["v_proj", "q_proj"])
    assert [name.rpartition(".")[2] for name in names_of(groups)] == ["q_proj", "v_proj"] * 2
    assert [group.block for group in groups] == [0, 1]


@pytest.mark.parametrize(("names", "blocks", "found"), [
    (["v_proj"], [1], ["model.layers.1.self_attn.v_proj"]),
    (["self_attn.v_proj"], [0], ["model.layers.0.self_attn.v_proj"]),
    (["model.layers.1.mlp.up_proj"], [], ["model.layers.1.mlp.up_proj"]),
    (["0.mlp.up_proj", "0.mlp.gate_proj"], [], ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]),
], ids=str)  # fmt: skip
def test_names_and_blocks_select_groups(llama: Manifest, names: list[str], blocks: list[int], found: list[str]) -> None:
    assert names_of(choose_groups(llama, names, blocks)) == found


def test_units_are_numbered_among_the_chosen_groups(llama: Manifest) -> None:
    groups = choose_groups(llama, ["all-linear"], [1])
    assert group_units(groups, "block") == (tuple(range(len(groups))),)
    assert group_units(groups, "group") == tuple((index,) for index in range(len(groups)))


@pytest.mark.parametrize(("names", "blocks", "said"), [
    (["proj"], [], "no module 'proj' that can be trained; --target-modules can be: down_proj, gate_proj, .*all-linear"),
    (["q_proj", "lm_head"], [], "no module 'lm_head'"),
    (["all-linear", "q_proj"], [], "no module 'all-linear'"),
    ([""], [], "no module ''"),
    (["q_proj"], [0, 7], "nothing to train in block 7; blocks are 0-1"),
    (["layers.0.mlp.up_proj"], [1], "no module layers.0.mlp.up_proj in the blocks 1; --target-modules can be"),
], ids=str)  # fmt: skip
def test_selection_of_nothing_is_a_usage_error(llama: Manifest, names: list[str], blocks: list[int], said: str) -> None:
    with pytest.raises(UsageError, match=said) as refused:
        choose_groups(llama, names, blocks)
    assert "\n" not in str(refused.value)


def test_default_may_name_a_missing_module(llama: Manifest) -> None:
    """PEFT's choice for an architecture does; what the user names must be there."""
    defaults = AdapterDefaults(8, 16.0, ("q_proj", "c_attn"))
    assert choose_groups(msgspec.structs.replace(llama, defaults=defaults)) == choose_groups(llama, ["q_proj"])
    with pytest.raises(UsageError, match="the bundle has no module c_attn"):
        choose_groups(msgspec.structs.replace(llama, defaults=AdapterDefaults(8, 16.0, ("c_attn",))))


def test_groups_of_an_adapter_have_its_modules_only(llama: Manifest) -> None:
    """Its own modules, and no others of their groups; of another model's there is nothing."""
    names = ["model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj", "transformer.h.0.c_attn"]
    assert names_of(groups_of(llama, names)) == [names[1], names[0]]
    assert groups_of(llama, names[2:]) == ()


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE_FAMILIES)]
)
def test_any_choice_has_the_groups_that_a_server_finds(tiny: TinyFactory, family: str) -> None:
    """In the same order, too: a group runs where its first chosen module does."""
    # Of the fp32 head, as the tests of training make it too.
    model = tiny(family, head_dtype="fp32")
    base, manifest = model.base, load_manifest(model.bundle)
    names = names_of(manifest.groups)
    assert bool(manifest.order) == (family in INTERLEAVED)
    draw = random.Random(0)
    choices = [draw.sample(names, draw.randint(1, len(names))) for _ in range(50)]
    for choice in [*choices, *([name] for name in names)]:
        assert choose_groups(manifest, choice) == groups_of(manifest, choice)
        assert without_gains(groups_of(manifest, choice)) == base.groups(choice)


INTERLEAVED = {"falcon", "cohere", "cohere2", "phi", "qwen2_moe"}
"""Between two modules that share an input, one of another group runs."""


def test_many_names_are_matched_quickly(llama: Manifest) -> None:
    groups = tuple(GroupSpec(block, 4, (TargetSpec(FUSED.format(block), 4),)) for block in range(3000))
    large = msgspec.structs.replace(llama, groups=groups)
    assert choose_groups(large, [FUSED.format(block) for block in range(100)]) == groups[:100]
    defaults = AdapterDefaults(8, 16.0, tuple(names_of(groups)))
    assert choose_groups(msgspec.structs.replace(large, defaults=defaults)) == groups


def test_module_names_and_number_ranges_are_short(llama: Manifest) -> None:
    assert module_names(llama.groups[:1]) == ["k_proj", "q_proj", "v_proj"]
    assert number_ranges({0, 1, 2, 5}) == "0-2,5"
    assert number_ranges([]) == ""


@pytest.mark.parametrize(
    ("blocks", "count", "chosen"),
    [
        (30, 8, [15, 17, 19, 21, 23, 25, 27, 29]), (30, 1, [29]), (30, 2, [21, 29]), (30, 4, [17, 21, 25, 29]),
        (32, 8, [17, 19, 21, 23, 25, 27, 29, 31]),
        (40, 8, [21, 24, 26, 29, 31, 34, 36, 39]), (10, 8, [2, 3, 4, 5, 6, 7, 8, 9]), (3, 9, [0, 1, 2]), (5, 2, [2, 4]),
    ],
)  # fmt: skip
def test_blocks_are_spread_over_the_upper_half(blocks: int, count: int, chosen: list[int]) -> None:
    assert list(spread(range(blocks), count)) == chosen
