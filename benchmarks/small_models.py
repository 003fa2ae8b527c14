"""Small models of four families with trained weights, for ``defaults.py``: no model hub is asked for anything.

Each is trained from nothing for some minutes, on the docstrings of installed packages, with one thread: the same
versions of everything make the same model. A folder has its weights, its tokenizer and ``trained.json``.
"""

from __future__ import annotations

import ast
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from children import log
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dlora.edge.files import write_atomically

PACKAGES: Final = ("numpy", "peft", "torch", "transformers")  # whose docstrings are read
END: Final = "<|endoftext|>"
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] + ':\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
VOCAB, WIDTH, BLOCKS, HEADS = 8192, 256, 8, 4
STEPS, BATCH, LENGTH = 450, 8, 256
PEAK_LR, WARMUP = 2e-3, 40
HELD_OUT: Final = 64  # texts of LENGTH tokens

_LLAMA_LIKE: Final[dict[str, Any]] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS, "max_position_embeddings": 2 * LENGTH, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_GPT2: Final[dict[str, Any]] = {
    "vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": 2 * LENGTH,
    "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_GEMMA3: Final[dict[str, Any]] = {
    **_LLAMA_LIKE, "num_key_value_heads": 1, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": LENGTH,
    "pad_token_id": 0,
}  # fmt: skip

FAMILIES: Final[dict[str, Callable[[], torch.nn.Module]]] = {
    # Learned positions, Conv1D, biases.
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT2)),
    # Norms of 1 + w, scaled embeddings, norms behind attention and MLP.
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**_GEMMA3)),
    # Attention and MLP side by side, a head of its own.
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**{**_LLAMA_LIKE, "intermediate_size": 4 * WIDTH})),
    # Biases of q, k and v, a tied head.
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LLAMA_LIKE, num_key_value_heads=2, tie_word_embeddings=True)),
}


def need_small_model(family: str, work: Path) -> Path:
    """The folder of a trained model, which is made where it is not there."""
    folder = work / family
    if not (folder / "trained.json").exists():
        _make(family, folder)
    return folder


def _make(family: str, folder: Path) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, tokens = _tokens(folder.parent)
    held_out, train = tokens[: HELD_OUT * LENGTH], tokens[HELD_OUT * LENGTH :]
    torch.manual_seed(0)
    model = FAMILIES[family]()
    _train(family, model, train)
    loss = _loss(model, held_out)
    counts = np.bincount(train, minlength=VOCAB) + 1.0
    unigram = float(-np.log(counts / counts.sum())[held_out].mean())
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    result = {"loss": round(loss, 4), "unigram_loss": round(unigram, 4), "steps": STEPS, "tokens": len(train)}
    write_atomically(folder / "trained.json", json.dumps(result).encode())
    log(f"{family}: held-out loss {loss:.3f}, a unigram model's {unigram:.3f}")


def _train(family: str, model: torch.nn.Module, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    rng, began = np.random.default_rng(0), time.monotonic()
    model.train()
    for step in range(STEPS):
        rate = min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * rate
        starts = rng.integers(0, len(tokens) - LENGTH, BATCH)
        rows = torch.from_numpy(np.stack([tokens[start : start + LENGTH] for start in starts]))
        loss = _row_loss(model, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 19:
            left = (time.monotonic() - began) / (step + 1) * (STEPS - step - 1)
            log(f"{family}: step {step + 1} of {STEPS}, loss {loss.item():.3f}, {left / 60:.0f} min left")


def _row_loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    logits = model(rows).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def _loss(model: torch.nn.Module, tokens: np.ndarray[Any, np.dtype[np.int64]]) -> float:
    model.eval()
    rows = torch.from_numpy(tokens.reshape(-1, LENGTH))
    return float(np.mean([_row_loss(model, part).item() for part in rows.split(BATCH)]))


# -- texts -------------------------------------------------------------------------------------------------


def _tokens(work: Path) -> tuple[Tokenizer, np.ndarray[Any, np.dtype[np.int64]]]:
    """One tokenizer and one drawn order of texts, for all families."""
    texts = sorted(set(_docstrings()))
    texts = [texts[place] for place in np.random.default_rng(0).permutation(len(texts))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids: list[int] = []
    for encoded in tokenizer.encode_batch(texts):
        ids += [*encoded.ids, 0]
    return tokenizer, np.array(ids, np.int64)


def _docstrings() -> Iterator[str]:
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"error: {package} is not installed")
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    tree = ast.parse(path.read_text(encoding="utf-8"))
                except (SyntaxError, UnicodeDecodeError):
                    continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = ast.get_docstring(node)
                    if text is not None and len(text) > 80:
                        yield text
