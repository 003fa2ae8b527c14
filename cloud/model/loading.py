"""Loads a base model quietly."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path

import msgspec
import safetensors
import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from dlora.protocol.errors import DloraError, ExportError
from dlora.protocol.text import first_line

from .source import ModelSource


def load_model(source: ModelSource, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """Load the causal language model of ``source``.

    ``dtype``: None: that of its files where all of them have one, which are mapped into memory then; else float32.

    Raises ``ExportError`` where it cannot be had, is not decoder-only, or is not a language model.
    """
    with quiet():
        try:
            if source.gguf_file is None:
                config = AutoConfig.from_pretrained(source.location)
                if getattr(config, "is_encoder_decoder", False):
                    raise ExportError(
                        f"{source.name} is an encoder-decoder model ({config.model_type}); "
                        "only decoder-only models are supported"
                    )
                dtype = dtype or _dtype_of_files(source.location)
                return AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype)
            with _gguf_once():
                return AutoModelForCausalLM.from_pretrained(
                    source.location, gguf_file=source.gguf_file, dtype=dtype or torch.float32
                )
        except DloraError:
            raise
        except Exception as error:  # a family's own code may raise anything
            reason = first_line(error)
            text = (
                f"cannot be loaded as a causal language model with transformers {transformers.__version__}: {reason}"
                if Path(source.location).exists()
                else "is not a local path and cannot be downloaded from the Hugging Face hub: "
                f"check the name and the network ({reason})"
            )
            raise ExportError(f"{source.name} {text}") from None


def _dtype_of_files(location: str) -> torch.dtype:
    """bfloat16 or float16 where all floats of the safetensors files are, whatever the config says; else float32.

    Raises as transformers' ``cached_file``.
    """
    names = [SAFE_WEIGHTS_NAME]
    index = cached_file(location, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        names = sorted(set(msgspec.json.decode(Path(index).read_bytes(), type=_Index).weight_map.values()))
    found = set[str]()
    for name in names:
        path = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
        if path is None:
            return torch.float32
        with safetensors.safe_open(path, "pt") as file:
            found |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  # it is no dict
    floats = {each for each in found if each.startswith(("F", "BF"))}
    if len(floats) != 1:
        return torch.float32
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(floats.pop(), torch.float32)


class _Index(msgspec.Struct):
    """Of a model whose weights are in several files: the file of each."""

    weight_map: dict[str, str]


@contextmanager
def _gguf_once() -> Iterator[None]:
    """transformers reads a GGUF file twice, token by token, and makes the table of its names anew for each module of
    the model. Inside, each is done once: less than half of the time (SmolLM2: docs/log/experiments.md)."""
    import gguf  # a twentieth of a second that other models need not take

    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in before.items():
        setattr(gguf, name, cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notices: stderr is ours.

    The bar of the GGUF reader obeys no setting, hence the redirection.
    """
    verbosity, hub_verbosity = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
