"""Puts an adapter into its base model's weights, with PEFT's own code: what comes out needs neither PEFT nor dlora."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import safetensors
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from dlora.cloud.model.base_model import BaseModel, find_source, load_model, quiet
from dlora.protocol import interrupts
from dlora.protocol.adapter_record import WEIGHTS_NAME
from dlora.protocol.errors import CheckpointError, DloraError, ExportError, ModelMismatchError, StorageError
from dlora.protocol.text import first_line
from dlora.protocol.version import SOFTWARE_VERSION

from .adapter_files import AdapterFiles
from .merge_settings import MERGED, MERGED_NAME, MergeSettings
from .output_directory import new_directory_for
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class Merged:
    """What was merged.

    Attributes:
        base_model, fingerprint: of the model as it was; is_checked: whether the adapter said that it is of that one.
        modules: how many had an adapter; adapter_sha256: of its weights.
        bytes: of the new directory's files, by name.
    """

    base_model: str
    fingerprint: str
    is_checked: bool
    modules: int
    adapter_sha256: str
    bytes: dict[str, int]


def merge_adapter(settings: MergeSettings, say: Callable[[str], None] = lambda _: None) -> Merged:
    """Write the base model with the adapter in its weights to ``settings.out``; ``say`` is told what is being done.

    Raises any ``DloraError``; nothing is left behind then, and a model that was there before is intact.
    """
    adapter = settings.check()
    say(f"loading {settings.model}")
    source = find_source(settings.model)
    # In float32 whatever comes out: a sum is rounded once.
    base = BaseModel.from_model(load_model(source), settings.model)
    _forget_quantisation(base)
    fingerprint = base.fingerprint
    if adapter.record is not None and adapter.record.base_fingerprint != fingerprint:
        raise ModelMismatchError(
            f"the adapter was trained on {adapter.record.base_model} ({adapter.record.base_fingerprint[:12]}…), "
            f"{settings.model} has other weights ({fingerprint[:12]}…); give the model that its bundle is of"
        )
    tokenizer = load_tokenizer(source, base)
    say("merging")
    modules, model = _merge(base, adapter)
    model.to(getattr(torch, settings.dtype))
    _check_finite(model, settings.dtype)
    with interrupts.raise_on_signal(), new_directory_for(settings.out, settings.force, MERGED) as directory:
        say("writing weights and tokenizer")
        with quiet():
            try:
                model.save_pretrained(directory)  # type: ignore[operator]
                tokenizer.save_pretrained(directory)
            except (OSError, safetensors.SafetensorError) as error:  # a full disk is either
                text = f"cannot write {settings.out}: {first_line(error)}; free space or choose another --out"
                raise StorageError(text) from None
        about = {
            "software": SOFTWARE_VERSION,
            "base_model": source.hub_id or settings.model,
            "base_fingerprint": fingerprint,
            "adapter_sha256": adapter.weights_sha256,
            "dtype": settings.dtype,
        }
        (directory / MERGED_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(about), indent=2) + b"\n")
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        mode = (directory / MERGED_NAME).stat().st_mode
        for path in files:
            path.chmod(mode)  # safetensors gives its files 0600
        sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
    return Merged(
        base_model=source.hub_id or settings.model,
        fingerprint=fingerprint,
        is_checked=adapter.record is not None,
        modules=modules,
        adapter_sha256=adapter.weights_sha256,
        bytes=sizes,
    )


def _forget_quantisation(base: BaseModel) -> None:
    """A GGUF file's weights are floats once they are loaded, but transformers would save no model that it calls
    quantised. Raises ``ExportError`` for one whose weights are still no floats."""
    quantizer = getattr(base.model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = quantizer.quantization_config.quant_method
    method = str(getattr(method, "value", method))
    if method != "gguf" or not all(weight.is_floating_point() for weight in base.model.parameters()):
        raise ExportError(
            f"{base.name} is quantised ({method}), and nothing can be merged into such weights; give the model that it "
            "was made from"
        )
    quantizer.remove_quantization_config(base.model)


def _merge(base: BaseModel, adapter: AdapterFiles) -> tuple[int, nn.Module]:
    """The number of modules with an adapter, and the model with it in its weights."""
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they are about is checked below
            model = PeftModel.from_pretrained(base.model, adapter.directory)
            loaded = set(get_peft_model_state_dict(model, save_embedding_layers=False))
            _check_same_weights(loaded, adapter, base)
            modules = sum(name.endswith(".lora_A.weight") for name in loaded)
            merged: nn.Module = model.merge_and_unload(safe_merge=True)
            return modules, merged
    except DloraError:
        raise
    except Exception as error:  # PEFT raises anything for an adapter that does not fit
        raise CheckpointError(
            f"{adapter.directory} cannot be merged into {base.name}: {first_line(error)}; give the model that it was "
            "trained on"
        ) from None


def _check_same_weights(loaded: set[str], adapter: AdapterFiles, base: BaseModel) -> None:
    """PEFT says nothing of weights whose module the model lacks; the rest alone would be another adapter."""
    with safetensors.safe_open(adapter.directory / WEIGHTS_NAME, "pt") as file:
        saved = set(file.keys())
    if saved != loaded:
        name = min(saved ^ loaded)
        raise CheckpointError(
            f"{adapter.directory} does not fit {base.name}: only {'the adapter' if name in saved else 'the model'} has "
            f"{name}; give the model that it was trained on"
        )


def _check_finite(model: nn.Module, dtype: str) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            advice = "; use --dtype bfloat16" if dtype == "float16" else ""
            raise ExportError(f"the merged model has values that {dtype} cannot hold, in {name}{advice}")
