"""What a bundle, an adapter or a run's directory is, in a few lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlora.edge.adapters.peft import load_adapter
from dlora.edge.training.choose_adapter import default_adapters
from dlora.edge.training.defaults import DEFAULT_KIND
from dlora.protocol.adapters import parameter_count
from dlora.protocol.choices import KindChoice
from dlora.protocol.errors import UsageError
from dlora.protocol.manifest import MANIFEST_NAME, Manifest, load_manifest
from dlora.protocol.targets import module_names, number_ranges


def describe(path: Path) -> dict[str, Any]:
    """Describe what lies at ``path``. Raises ``UsageError`` where it is neither bundle nor adapter."""
    if (path / MANIFEST_NAME).exists():
        return _describe_bundle(path)
    if (path / "adapter_config.json").exists():
        return _describe_adapter(path)
    if not path.exists():
        raise UsageError(f"there is no {path}")
    raise UsageError(f"{path} is neither a bundle (manifest.json) nor a PEFT adapter (adapter_config.json)")


def _describe_bundle(path: Path) -> dict[str, Any]:
    manifest = load_manifest(path)
    base = manifest.base_model
    return {
        "kind": "bundle",
        "base_model": base.name,
        "architecture": base.architecture,
        "parameters": base.parameters,
        "blocks": base.blocks,
        "hidden_size": base.hidden_size,
        "vocabulary_size": base.vocabulary_size,
        "max_sequence_length": base.max_sequence_length,
        "fingerprint": base.fingerprint,
        "exchange_groups": len(manifest.groups),
        "can_be_trained": ", ".join(module_names(manifest.groups)),
        "default_kind": DEFAULT_KIND,
        **_defaults("default", DEFAULT_KIND, manifest),
        **_defaults("lora", "lora", manifest),
        "head_dtype": manifest.head.dtype,
        "embedding_dtype": manifest.embedding.dtype,
        **_device_blocks(manifest),
        "graphs": len(manifest.graphs),
        "engines": ", ".join(manifest.engines),
        "size_mb": round(sum(file.bytes for file in manifest.files.values()) / 1e6, 1),
        "written_by": manifest.software,
        "format": manifest.format,
    }


def _device_blocks(manifest: Manifest) -> dict[str, Any]:
    """The blocks that a device can run itself."""
    spec = manifest.device_blocks
    if spec is None:
        return {"device_blocks": 0}
    return {
        "device_blocks": len(spec.blocks),
        "device_block_numbers": number_ranges(block.index for block in spec.blocks),
        "device_block_dtype": spec.dtype,
        "device_blocks_generate": spec.without_decode or "yes",
    }


def _defaults(prefix: str, kind: KindChoice, manifest: Manifest) -> dict[str, Any]:
    """What a run of a kind has where its user names nothing else."""
    spec, groups = default_adapters(kind, manifest)
    return {
        f"{prefix}_target_modules": ", ".join(module_names(groups)),
        f"{prefix}_blocks": number_ranges({group.block for group in groups}),
        f"{prefix}_r": spec.r,
        f"{prefix}_exchange_groups": len(groups),
        f"{prefix}_trained_parameters": parameter_count(spec, groups),
    }


def _describe_adapter(path: Path) -> dict[str, Any]:
    loaded = load_adapter(path)
    blocks = {int(part) for name in loaded.modules for part in name.split(".") if part.isdecimal()}
    return {
        "kind": "PEFT LoRA adapter",
        "trained_as": loaded.parts.kind if loaded.parts is not None else "lora",
        "acts": "from its invocation on" if loaded.invocation else "everywhere",
        "r": loaded.r,
        "lora_alpha": loaded.lora_alpha,
        "base_model": loaded.base_model_name,
        "base_fingerprint": loaded.record.base_fingerprint if loaded.record is not None else "unknown",
        "base_weight_format": loaded.record.base_weight_format if loaded.record is not None else "unknown",
        "modules": len(loaded.modules),
        "blocks": number_ranges(blocks),
        "parameters": sum(module.lora_A.size + module.lora_B.size for module in loaded.modules.values()),
        "checkpoints": len(list(path.glob("checkpoints/checkpoint-*.safetensors"))),
    }
