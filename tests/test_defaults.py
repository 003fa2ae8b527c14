"""What a run's adapters are where its user leaves it open."""

from __future__ import annotations

import msgspec
import pytest
from tiny import TinyFactory

from dlora.edge.training.choose_adapter import default_adapters
from dlora.edge.training.defaults import default_rank, default_target_modules
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.manifest import Manifest, load_manifest
from dlora.protocol.targets import choose_groups, groups_of, module_names, names_selecting, target_names

GATE = TargetSpec("model.layers.1.mlp.shared_expert_gate", 1)


@pytest.fixture(scope="module")
def manifest(tiny: TinyFactory) -> Manifest:
    return load_manifest(tiny().bundle)


def with_gate(manifest: Manifest) -> Manifest:
    """As of a mixture whose shared expert has a gate that gives one number, with an input of its own."""
    gate = GroupSpec(1, manifest.base_model.hidden_size, (GATE,))
    return msgspec.structs.replace(manifest, groups=(*manifest.groups, gate))


def test_rank_is_no_larger_than_the_narrowest_group(manifest: Manifest) -> None:
    spec, groups = default_adapters("bottleneck", manifest)
    assert spec.r == min(min(group.in_features, group.out_features) for group in groups) == 16
    assert default_target_modules("bottleneck", manifest, "answer") == ("all-linear",)


def test_gate_gets_no_core_and_changes_no_rank(manifest: Manifest) -> None:
    gated = with_gate(manifest)
    assert GATE.name.rpartition(".")[2] in module_names(choose_groups(gated, ("all-linear",)))
    assert default_adapters("bottleneck", gated) == default_adapters("bottleneck", manifest)


def test_rank_that_a_gate_cannot_have_is_not_lowered_for_it(manifest: Manifest) -> None:
    """Who asks for all modules is told, and does not get a rank of 1 in each of them."""
    gated = with_gate(manifest)
    assert default_rank("bottleneck", gated, choose_groups(gated, ("all-linear",))) == 16
    assert default_rank("bottleneck", gated, choose_groups(gated, ("shared_expert_gate",))) == 1


def test_one_module_without_activation_leaves_out_no_other(manifest: Manifest) -> None:
    """Also where others have the same last part: the down_proj of another block."""
    without = "model.layers.1.mlp.down_proj"
    changed = msgspec.structs.replace(manifest, without_activation=(without,))
    every = set(target_names(manifest.groups))
    names = default_target_modules("bottleneck", changed, "answer")
    chosen = set(target_names(choose_groups(changed, names)))
    assert chosen == every - {without}
    assert default_target_modules("bottleneck", changed, "all") == ("all-linear",)
    assert default_target_modules("lora", changed, "answer") == manifest.defaults.target_modules


def test_names_are_the_last_parts_where_these_select_the_same(manifest: Manifest) -> None:
    groups = choose_groups(manifest, ("gate_proj", "up_proj"))
    assert names_selecting(manifest, groups) == ("gate_proj", "up_proj")
    assert names_selecting(manifest, groups[:1], {0}) == ("gate_proj", "up_proj")
    assert len(names_selecting(manifest, groups[:1])) == 2
    assert choose_groups(manifest, names_selecting(manifest, groups[:1])) == groups[:1]
    mixed = groups_of(manifest, {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.gate_proj"})
    assert choose_groups(manifest, names_selecting(manifest, mixed)) == mixed


def test_lora_has_what_the_bundle_says(manifest: Manifest) -> None:
    spec, groups = default_adapters("lora", manifest)
    assert (spec.r, groups) == (manifest.defaults.r, choose_groups(manifest))
