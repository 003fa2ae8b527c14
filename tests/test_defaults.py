"""What a run's adapters are where its user leaves it open."""

from __future__ import annotations

import msgspec
import pytest
from tiny import TinyFactory

from dlora.edge.commands.adapter_settings import default_adapters
from dlora.edge.training.defaults import default_rank, default_target_modules
from dlora.protocol.groups import GroupSpec, TargetSpec
from dlora.protocol.manifest import Manifest, load_manifest
from dlora.protocol.targets import choose_groups, module_names

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


def test_lora_has_what_the_bundle_says(manifest: Manifest) -> None:
    spec, groups = default_adapters("lora", manifest)
    assert (spec.r, groups) == (manifest.defaults.r, choose_groups(manifest))
