"""The tokenizer for a device that has the ``tokenizers`` library but not ``transformers``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dlora.cloud.model.base_model import BaseModel, ModelSource, quiet
from dlora.protocol.child import library_errors
from dlora.protocol.errors import ExportError
from dlora.protocol.manifest import TokenizerSpec

FOLDER: Final = "tokenizer"


def load_tokenizer(source: ModelSource, base: BaseModel) -> Any:
    """The Hugging Face tokenizer that belongs to the base model.

    Raises ``ExportError`` where there is none, it is not of the fast kind, or has more words than the embedding.
    """
    problem = f"{source.name} has no tokenizer that can be loaded"
    with quiet(), library_errors(ExportError, problem, "save one there with its save_pretrained"):
        tokenizer = AutoTokenizer.from_pretrained(source.location, gguf_file=source.gguf_file)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ExportError(
            f"the tokenizer of {source.name} has no tokenizer.json, which a device needs; "
            "convert it to a fast tokenizer"
        )
    rows = base.token_embedding.weight.shape[0]
    beyond = _beyond(tokenizer, rows)
    template = str(tokenizer.chat_template or "")
    words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    ends = {_text(tokenizer.bos_token), _text(tokenizer.eos_token)}
    added = tokenizer.backend_tokenizer.encode("").ids  # by the tokenizer itself, to every text
    is_needed = any(token in words or token in ends or token in template for token in beyond)
    if is_needed or any(number >= rows for number in added):
        raise ExportError(
            f"the tokenizer of {source.name} has {len(tokenizer)} tokens but the embedding only {rows} rows; "
            "they do not belong together"
        )
    return tokenizer


def _beyond(tokenizer: Any, rows: int) -> list[str]:
    """Tokens without a row of the embedding, such as Gemma 3's for images, in the models that have none."""
    return [token for token, number in tokenizer.backend_tokenizer.get_vocab().items() if number >= rows]


def save_tokenizer(bundle: Path, tokenizer: Any, base: BaseModel) -> TokenizerSpec:
    """Write ``tokenizer.json``, without tokens that have no row, and the chat template, where there is one."""
    folder = bundle / FOLDER
    folder.mkdir()
    # A copy: truncation and padding are the caller's business, and may be set on the original.
    text = tokenizer.backend_tokenizer.to_str()
    if beyond := _beyond(tokenizer, base.token_embedding.weight.shape[0]):
        # The library can add tokens and cannot remove them; all else of the file, some 30 MB, stays as it is.
        parsed = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        added = msgspec.json.decode(parsed["added_tokens"], type=list[dict[str, Any]])
        added = [token for token in added if token["content"] not in beyond]
        text = msgspec.json.encode({**parsed, "added_tokens": added}).decode()
    plain = Tokenizer.from_str(text)
    plain.no_truncation()
    plain.no_padding()
    (folder / "tokenizer.json").write_text(plain.to_str(), encoding="utf-8")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template and not isinstance(template, str):
        raise ExportError(f"the tokenizer's chat template is no text but {type(template).__name__}; mend its config")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return TokenizerSpec(
        file=f"{FOLDER}/tokenizer.json",
        chat_template=f"{FOLDER}/chat_template.jinja" if template else None,
        bos_token=_text(tokenizer.bos_token),
        eos_token=_text(tokenizer.eos_token),
        eos_token_id=tokenizer.eos_token_id,
        stop_token_ids=_stop_token_ids(tokenizer, base),
    )


def _text(token: object) -> str | None:
    return None if token is None else str(token)


def _stop_token_ids(tokenizer: Any, base: BaseModel) -> tuple[int, ...]:
    found = {tokenizer.eos_token_id}
    for config in (base.model.generation_config, base.model.config):
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [ids])
    return tuple(sorted(token for token in found if isinstance(token, int) and 0 <= token < base.vocabulary_size))
