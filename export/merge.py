"""Puts an adapter into its base model's weights, with PEFT's own code: what comes out needs neither PEFT nor dlora."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import safetensors
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from dlora.cloud.model.base_model import BaseModel, find_source, load_model, quiet, reach
from dlora.cloud.model.low_bits import round_to_low_bits
from dlora.protocol import interrupts
from dlora.protocol.adapter_record import WEIGHTS_NAME
from dlora.protocol.errors import CheckpointError, DloraError, ExportError, ModelMismatchError, StorageError
from dlora.protocol.module_patterns import Patterns, check_matching_time, first_match
from dlora.protocol.text import first_line
from dlora.protocol.version import SOFTWARE_VERSION

from .adapter_files import AdapterFiles
from .output_directory import new_directory_for
from .settings import MERGED, MERGED_NAME, MergeSettings
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


def merge_adapter(
    settings: MergeSettings, say: Callable[[str], None] = lambda _: None, tell: Callable[[str], None] = lambda _: None
) -> Merged:
    """Write the base model with the adapter in its weights to ``settings.out``; ``say`` is called with what is being
    done, ``tell`` with what is to stay to be read.

    Raises any ``DloraError``; nothing is left behind then, and a model that was there before is intact.
    """
    adapter = settings.check()
    say(f"loading {settings.model}")
    source = reach(find_source(settings.model), tell)
    # In float32 whatever comes out: a sum is rounded once.
    loaded = load_model(source)
    weight_format = "full" if adapter.record is None else adapter.record.base_weight_format
    round_to_low_bits(loaded, weight_format)
    base = BaseModel.from_model(loaded, settings.model, weight_format)
    _forget_quantisation(base)
    fingerprint = base.fingerprint
    if adapter.record is not None and adapter.record.base_fingerprint != fingerprint:
        raise ModelMismatchError(
            f"the adapter was trained on {adapter.record.base_model} ({adapter.record.base_fingerprint[:12]}…), "
            f"{settings.model} has other weights ({fingerprint[:12]}…); give the model that its bundle is of"
        )
    tokenizer = load_tokenizer(source, base)
    name = source.hub_id or settings.model
    say("merging")
    modules, model = _merge(base, adapter)
    model.to(getattr(torch, settings.dtype))
    for parameter, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            advice = "; use --dtype bfloat16" if settings.dtype == "float16" else ""
            raise ExportError(f"the merged model has values that {settings.dtype} cannot hold, in {parameter}{advice}")
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
            "base_model": name,
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
    return Merged(name, fingerprint, adapter.record is not None, modules, adapter.weights_sha256, sizes)


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
            with safetensors.safe_open(adapter.directory / WEIGHTS_NAME, "pt") as file:
                saved = set(file.keys())
            config = LoraConfig.from_pretrained(str(adapter.directory))
            _name_modules(config, adapter, saved, base.model)
            model = PeftModel.from_pretrained(base.model, adapter.directory, config=config)
            loaded = set(get_peft_model_state_dict(model, save_embedding_layers=False))
            if saved != loaded:  # PEFT says nothing of weights whose module the model lacks
                name = min(saved ^ loaded)
                whose = "the adapter" if name in saved else "the model"
                raise CheckpointError(
                    f"{adapter.directory} does not fit {base.name}: only {whose} has {name}; give the model that it "
                    "was trained on"
                )
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


def _name_modules(config: LoraConfig, adapter: AdapterFiles, saved: set[str], model: nn.Module) -> None:
    """Put names in place of all patterns of modules: they are a stranger's, and PEFT gives them to ``re``, which some
    keep busy for ever. The modules are those that have weights."""
    targets = tuple(config.target_parameters or ())
    names = sorted({name.removeprefix("base_model.model.").split(".lora_")[0] for name in saved if ".lora_" in name})
    if isinstance(config.target_modules, str) or config.exclude_modules or config.layers_pattern:
        config.target_modules = list(names)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    names += [name for name, _ in model.named_parameters() if name.endswith(targets)]
    check_matching_time(adapter.directory, [*adapter.ranks.values(), *adapter.alphas.values()], names)
    config.rank_pattern = _by_name(config.rank_pattern or {}, adapter.ranks, names)
    config.alpha_pattern = _by_name(config.alpha_pattern or {}, adapter.alphas, names)


def _by_name(values: dict[str, int], patterns: Patterns, names: list[str]) -> dict[str, int]:
    """One pattern a value, of all modules that have it: ``re`` keeps few patterns, and makes others again and again."""
    found: dict[int, list[str]] = {}
    for name in names:
        pattern = first_match(patterns, name)
        if pattern is not None:
            found.setdefault(values[pattern], []).append(re.escape(name))
    return {f"^(?:{'|'.join(names)})": value for value, names in found.items()}
