"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

Only the modules given are written, so an adapter trained with kill-and-revive holds its live units and no more.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors

from dlora.edge.files import make_directory, storage_errors, write_atomically
from dlora.edge.tensor_file import safetensors_chunks
from dlora.protocol.adapter_record import (
    CONFIG_NAME,
    RECORD_NAME,
    WEIGHTS_NAME,
    AdapterRecord,
    TrainingRecord,
    encode_record,
    load_record,
)
from dlora.protocol.choices import WeightFormat
from dlora.protocol.errors import CheckpointError
from dlora.protocol.limits import MAX_RANK
from dlora.protocol.module_patterns import check_matching_time, first_match, read_patterns
from dlora.protocol.structure_words import structure_words
from dlora.protocol.tensors import FloatArray
from dlora.protocol.version import ADAPTER_FORMAT, SOFTWARE_VERSION

from .kind import SavedModule
from .model_card import CARD_NAME, model_card
from .parts import Parts, load_parts, save_parts

_PREFIX: Final = "base_model.model."
_MAX_NUMBER: Final = 2**31
_MAX_NAME: Final = 256
_MAX_INVOCATION: Final = 256
_MAX_CONFIG_BYTES: Final = 16 << 20
NARROW: Final[Any] = np.float16  # of weights whose exact values stand in adapter_parts.safetensors
_NEAR: Final = 1e-3  # of a matrix's norm; rounding takes less, but of numbers below 6e-5

# Settings of PEFT under which B A x is not all that the adapter does: each must be absent or falsy.
_UNSUPPORTED: Final = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "biases in lora_B",
    "modules_to_save": "modules saved whole (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "targets that are parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}


@dataclass(frozen=True)
class LoadedAdapter:
    """A LoRA read from disk.

    Attributes:
        r, lora_alpha: the configuration's defaults; single modules may differ.
        scaling: by module name, what ``lora_B @ lora_A`` is multiplied by.
        modules: by module name.
        parts: what it was trained as, where that is another kind than ``lora``.
        invocation: the tokens from which on it acts (activated LoRA); none: everywhere.
        weights_sha256: of the file of weights.
        record: what was written about it where it was trained; None: its base model's fingerprint is unknown.
    """

    r: int
    lora_alpha: float
    scaling: dict[str, float]
    modules: dict[str, SavedModule]
    base_model_name: str | None
    parts: Parts | None = None
    invocation: tuple[int, ...] = ()
    weights_sha256: str = ""
    record: AdapterRecord | None = None


def save_adapter(
    directory: Path,
    modules: Iterable[SavedModule],
    *,
    r: int,
    lora_alpha: float,
    base_model_name: str,
    target_modules: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    parts: Parts | None = None,
    invocation: tuple[int, ...] = (),
    base_fingerprint: str | None = None,
    base_weight_format: WeightFormat = "full",
    training: TrainingRecord | None = None,
) -> None:
    """Write an adapter that ``PeftModel.from_pretrained`` loads.

    Args:
        modules: at least one, all of rank ``r``; no others are written. With ``parts``, which have the exact values,
            in float16, and else in float32.
        target_modules: what the user asked for, for the model card; the configuration names ``modules``.
        fan_in_fan_out: whether the targets are ``Conv1D`` (GPT-2).
        parts: what it was trained as, where that is another kind than ``lora``.
        invocation: the tokens from which on it acts; none: everywhere.
        base_fingerprint, base_weight_format: of the base model, for ``dlora_adapter.json``; None: there will be none.
        training: what it learnt, for the same.

    PEFT's two files cannot change at one instant, so for the moment between, the configuration names the old and
    the new modules: PEFT gives those without weights a B of zero, and the adapter is wholly the old or the new. The
    record has the digests of both for as long.

    Raises ``StorageError``.
    """
    tensors = _tensors(modules, r, is_narrow=parts is not None)
    names = sorted({name.rpartition(".lora_")[0].removeprefix(_PREFIX) for name in tensors})
    assert names
    make_directory(directory)
    config = _config(
        names, r=r, lora_alpha=lora_alpha, base_model_name=base_model_name, fan_in_fan_out=fan_in_fan_out,
        invocation=invocation,
    )  # fmt: skip
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    # PEFT and transformers look for this very "format".
    digest = _sha256(safetensors_chunks(tensors, {"format": "pt"}))
    record = None
    if base_fingerprint is not None:
        record = AdapterRecord(
            format=ADAPTER_FORMAT,
            software=SOFTWARE_VERSION,
            base_model=base_model_name,
            base_fingerprint=base_fingerprint,
            kind=parts.kind if parts is not None else "lora",
            rank=r,
            weights_sha256=digest,
            training=training,
            base_weight_format=base_weight_format,
        )

    old = _replaced_config(config_path)
    if old is not None and {**old, "target_modules": None} == {**config, "target_modules": None}:
        _write_record(directory, record, replaces=weights_path)
        if old["target_modules"] != config["target_modules"]:
            both = sorted({*old["target_modules"], *config["target_modules"]})
            write_atomically(config_path, _json({**config, "target_modules": both}))
    else:
        # Another run's adapter, perhaps of another rank: between the files it would be a mixture. None is better.
        with storage_errors(weights_path):
            weights_path.unlink(missing_ok=True)
        _write_record(directory, record)
        write_atomically(config_path, _json(config))
    write_atomically(weights_path, safetensors_chunks(tensors, {"format": "pt"}))
    write_atomically(config_path, _json(config))
    save_parts(directory, parts, digest)
    _write_record(directory, record)
    card = model_card(
        len(names), r, lora_alpha, base_model_name, target_modules, acts_on_answers=bool(invocation), record=record
    )
    write_atomically(directory / CARD_NAME, card.encode())


def _tensors(modules: Iterable[SavedModule], r: int, *, is_narrow: bool) -> dict[str, npt.NDArray[Any]]:
    """By the names of PEFT's file; of one group, whose modules have one A, it is in memory once."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    given_a = kept_a = np.empty(0, np.float32)
    for module in modules:
        if module.lora_A.shape[0] != r or module.lora_B.shape[1] != r:  # they may be of a file
            raise ValueError(f"{module.name} has not rank {r}")
        if module.lora_A is not given_a:
            given_a, kept_a = module.lora_A, _stored(module.lora_A, is_narrow)
        tensors[f"{_PREFIX}{module.name}.lora_A.weight"] = kept_a
        tensors[f"{_PREFIX}{module.name}.lora_B.weight"] = _stored(module.lora_B, is_narrow)
    return tensors


def _stored(values: FloatArray, is_narrow: bool) -> npt.NDArray[Any]:
    """In ``NARROW`` where asked and near enough: it is too short for large values and for small ones."""
    if is_narrow:
        with np.errstate(over="ignore"):
            narrow = np.ascontiguousarray(values, NARROW)
        if np.linalg.norm(narrow.astype(np.float32) - values) <= _NEAR * np.linalg.norm(values):
            return narrow
    return np.ascontiguousarray(values, np.float32)


def load_adapter(directory: Path) -> LoadedAdapter:
    """Read a PEFT LoRA. Raises ``CheckpointError`` for anything that is not one, naming what it is instead, and for one
    whose weights are not those that its record was written about."""
    config = _read_config(directory)
    _check_supported(directory, config)
    r, alpha = _rank(directory, config, "r"), _number(directory, config, "lora_alpha")
    ranks, alphas = (read_patterns(directory, config, key) for key in ("rank_pattern", "alpha_pattern"))
    weights = _read_weights(directory)
    digest = _sha256((weights,))
    record = load_record(directory)
    if record is not None:
        record.check_weights(directory, digest)
    pairs = _lora_pairs(directory, weights)
    check_matching_time(directory, [*ranks.values(), *alphas.values()], list(pairs))
    modules, scaling = {}, {}
    for name, found in pairs.items():
        if set(found) != {"A", "B"}:
            raise CheckpointError(f"{directory}: {name} has no lora_{'B' if 'A' in found else 'A'}")
        a, b = found["A"], found["B"]
        pattern = first_match(ranks, name)
        rank = r if pattern is None else _rank(directory, config["rank_pattern"], pattern)
        if a.ndim != 2 or b.ndim != 2:
            raise CheckpointError(f"{directory}: {name} is no linear module's LoRA")
        if a.shape[0] != rank or b.shape[1] != rank:
            raise CheckpointError(
                f"{directory}: {name} has rank {a.shape[0]} (A) and {b.shape[1]} (B), the configuration says {rank}"
            )
        pattern = first_match(alphas, name)
        module_alpha = alpha if pattern is None else _number(directory, config["alpha_pattern"], pattern)
        scaling[name] = module_alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        modules[name] = SavedModule(name, a, b)
    invocation = _invocation(directory, config)
    base = config.get("base_model_name_or_path")
    parts = load_parts(directory, digest)
    base_name = base if isinstance(base, str) else None
    return LoadedAdapter(r, alpha, scaling, modules, base_name, parts, invocation, digest, record)


def _sha256(chunks: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _write_record(directory: Path, record: AdapterRecord | None, *, replaces: Path | None = None) -> None:
    """Write what is said of an adapter, before and after its weights are: ``replaces``, the file that these are to
    replace, counts as well until then."""
    path = directory / RECORD_NAME
    if record is None:
        with storage_errors(path):
            path.unlink(missing_ok=True)
        return
    if replaces is not None and replaces.is_file():
        with storage_errors(replaces), replaces.open("rb") as file:
            old = hashlib.file_digest(file, "sha256").hexdigest()
        record = msgspec.structs.replace(record, replaces_sha256=old, training=None)
    write_atomically(path, encode_record(record))


def _config(
    names: list[str],
    *,
    r: int,
    lora_alpha: float,
    base_model_name: str,
    fan_in_fan_out: bool,
    invocation: tuple[int, ...],
) -> dict[str, Any]:
    # Defaults of whatever PEFT reads this are right for all else; keys that some version lacks would make it warn.
    return ({"alora_invocation_tokens": list(invocation)} if invocation else {}) | {
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": r,
        "target_modules": names,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _replaced_config(path: Path) -> dict[str, Any] | None:
    """The configuration that a save replaces, if it has the shape of ours."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    names = found.get("target_modules")
    return found if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def _json(value: Mapping[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no regular file")
        with path.open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is too large to be a configuration")
        return msgspec.json.decode(content, type=dict[str, Any])
    except (FileNotFoundError, NotADirectoryError):
        reason = "it has no adapter_config.json" if directory.is_dir() else "there is no such directory"
        raise CheckpointError(f"{directory} is not a PEFT adapter: {reason}") from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({structure_words(error)})") from None


def _check_supported(directory: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{directory} is a PEFT adapter of type {kind}; only LORA can be used")
    if config.get("bias", "none") != "none":
        raise CheckpointError(f"{directory} trains biases (bias={config['bias']!r}); only bias='none' can be used")
    for key, name in _UNSUPPORTED.items():
        if config.get(key):
            raise CheckpointError(f"{directory} uses {name}; only plain LoRA can be used")
    # PiSSA and its kind change the base model's weights at the start; PEFT marks what it converted back with true.
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal", "eva", "true", "false"):
        raise CheckpointError(f"{directory} needs a changed base model (init_lora_weights={start!r}); convert it first")


def _read_weights(directory: Path) -> bytes:
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{directory} has its weights as a pickle (adapter_model.bin), which is never loaded; "
                "save it with safetensors"
            )
        raise CheckpointError(f"{directory} has no {WEIGHTS_NAME}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None


def _lora_pairs(directory: Path, weights: bytes) -> dict[str, dict[str, FloatArray]]:
    """Module name to its ``A`` and ``B``, float32."""
    path = directory / WEIGHTS_NAME
    pairs: dict[str, dict[str, FloatArray]] = {}
    try:
        for key, tensor in _float32_tensors(path, weights).items():
            match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight", key)
            if match is None or len(match[1]) > _MAX_NAME:
                raise CheckpointError(f"{directory} has {key}, which is no part of a plain LoRA")
            pairs.setdefault(match[1], {})[match[2]] = tensor
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    if not pairs:
        raise CheckpointError(f"{path} has no modules")
    return pairs


def _float32_tensors(path: Path, weights: bytes) -> dict[str, FloatArray]:
    found = {}
    for key, tensor in safetensors.deserialize(weights):  # type: ignore[no-untyped-call]
        if tensor["dtype"] == "BF16":
            # numpy knows no bfloat16: it is the upper half of a float32.
            values = (np.frombuffer(tensor["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
        elif tensor["dtype"] in ("F16", "F32", "F64"):
            width = tensor["dtype"][1:]
            values = np.frombuffer(tensor["data"], np.dtype(f"float{width}")).astype(np.float32)
        else:
            raise CheckpointError(f"{path}: {key} is of type {tensor['dtype']}; only floats can be used")
        if not np.isfinite(values).all():
            raise CheckpointError(f"{path}: {key} has values that are not finite")
        found[key] = values.reshape(tensor["shape"])
    return found


def _number(directory: Path, config: Mapping[str, Any], key: str) -> float:
    value = config.get(key, 8)  # PEFT's default for both
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < _MAX_NUMBER:
        raise CheckpointError(f"{directory}: {key} in {CONFIG_NAME} must be a positive number below 2**31")
    return value


def _invocation(directory: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    found = config.get("alora_invocation_tokens") or []
    is_right = isinstance(found, list) and len(found) <= _MAX_INVOCATION
    if not is_right or not all(type(token) is int and 0 <= token < _MAX_NUMBER for token in found):
        raise CheckpointError(f"{directory}: alora_invocation_tokens in {CONFIG_NAME} must be some token ids")
    return tuple(found)


def _rank(directory: Path, config: Mapping[str, Any], key: str) -> int:
    value = _number(directory, config, key)
    if value != int(value):
        raise CheckpointError(f"{directory}: {key} in {CONFIG_NAME} is a rank and must be a whole number")
    if value > MAX_RANK:
        raise CheckpointError(f"{directory}: {key} in {CONFIG_NAME} is {value}; ranks up to {MAX_RANK} can be used")
    return int(value)
