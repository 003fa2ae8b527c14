"""Trains small models of four families on text at hand, for ``defaults.py``: what is tuned on one model shows there.

Each has eight blocks of width 192 and a vocabulary of 4,096 of its own making, and is trained for some minutes until
its loss on held-out text is well below that of a model that only knows how frequent each token is. They differ in what
rates may depend on: learned positions and Conv1D (gpt2), norms of 1 + w and scaled embeddings (gemma3), attention and
MLP side by side (gpt_neox), biases and a head that is the embedding (qwen2). A model that is there is not trained
again. JSON goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from children import QUIET_THREADS, log

os.environ.update({key: os.environ.get(key, value) for key, value in QUIET_THREADS.items()})

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY: Final = 4096
WIDTH: Final = 192
BLOCKS: Final = 8
HEADS: Final = 6
CONTEXT: Final = 192
BATCH: Final = 16
STEPS: Final = 700
PEAK_LR: Final = 2e-3
LONGEST_FILE: Final = 200_000
END: Final = "<|end|>"

FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gpt2": ("gpt2", {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": HEADS, "n_positions": 1024}),
    "gemma3": (
        "gemma3_text",
        {
            "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
            "query_pre_attn_scalar": 32, "sliding_window": 512,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS, "max_position_embeddings": 1024, "use_parallel_residual": True,
        },
    ),
    "qwen2": (
        "qwen2",
        {
            "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
"""Model types and what differs from their configs' defaults, by the names of their folders."""


def main() -> None:
    """Train what is missing, and print what each has come to."""
    options = _options()
    torch.set_num_threads(options.threads)
    tokenizer = _tokenizer(options.out / "tokenizer", options.data)
    tokens = _tokens(tokenizer, options.out / "tokens.npy", options.data)
    held_out, rest = tokens[:CONTEXT * 256], tokens[CONTEXT * 256 :]
    found = {}
    for name in options.only or FAMILIES:
        place = options.out / name
        if not (place / "about.json").exists():
            about = train(name, place, tokenizer, rest, held_out, options.steps)
            (place / "about.json").write_text(json.dumps(about, indent=1) + "\n")
        found[name] = json.loads((place / "about.json").read_text())
    print(json.dumps(found, indent=1))


def train(
    name: str, place: Path, tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray, held_out: np.ndarray, steps: int
) -> dict[str, Any]:
    """Train one model and save it in ``place/model``; what it has come to, losses in nats a token."""
    torch.manual_seed(0)
    model_type, changes = FAMILIES[name]
    end = tokenizer.convert_tokens_to_ids(END)
    config = AutoConfig.for_model(
        model_type, vocab_size=VOCABULARY, bos_token_id=end, eos_token_id=end, pad_token_id=end, **changes
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1)
    batches, started = _batches(tokens), time.perf_counter()
    for step in range(steps):
        share = min((step + 1) / 50, (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * share
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            log(f"{name}: step {step}/{steps}, loss {float(loss.detach()):.3f}, {time.perf_counter() - started:.0f} s")
    model.eval()
    rows = torch.from_numpy(held_out.reshape(-1, CONTEXT).astype(np.int64))
    with torch.no_grad():
        losses = [float(model(input_ids=part, labels=part, use_cache=False).loss) for part in rows.split(BATCH)]
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return {
        "model_type": model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "tokens": steps * BATCH * CONTEXT,
        "held_out_loss": round(sum(losses) / len(losses), 4),
        "unigram_loss": round(_unigram_loss(tokens, held_out), 4),
        "wall_s": round(time.perf_counter() - started),
    }


def _batches(tokens: np.ndarray) -> Iterator[torch.Tensor]:
    """int64 (BATCH, CONTEXT), drawn."""
    random = np.random.default_rng(0)
    while True:
        starts = random.integers(0, len(tokens) - CONTEXT, BATCH)
        yield torch.from_numpy(np.stack([tokens[start : start + CONTEXT] for start in starts]).astype(np.int64))


def _unigram_loss(tokens: np.ndarray, held_out: np.ndarray) -> float:
    """Of a model that knows how often each token comes in ``tokens``, each at least once."""
    counts = np.bincount(tokens, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


# -- text --------------------------------------------------------------------------------------------------


def _texts(data: Path) -> Iterator[str]:
    """English at hand: Python's own help, what installed packages say of themselves, and questions of ``data``."""
    yield from pydoc_data.topics.topics.values()
    packages = Path(sysconfig.get_paths()["purelib"])
    for path in sorted([*packages.rglob("*.md"), *packages.rglob("METADATA"), *packages.rglob("*.rst")]):
        yield path.read_text(encoding="utf-8", errors="ignore")[:LONGEST_FILE]
    for path in sorted((data / "commonsense").rglob("train.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))[:4000]:
            yield row["instruction"]
    lines = (data / "banking77" / "train.csv").read_text(encoding="utf-8").splitlines()[1:]
    yield from (line.rpartition(",")[0].strip('"') for line in lines)  # without their intents


def _tokenizer(place: Path, data: Path) -> PreTrainedTokenizerFast:
    if not place.exists():
        log("training a tokenizer …")
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        )
        raw.train_from_iterator(_texts(data), trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=raw, eos_token=END, bos_token=END, pad_token=END
        ).save_pretrained(place)
    return PreTrainedTokenizerFast.from_pretrained(place)


def _tokens(tokenizer: PreTrainedTokenizerFast, path: Path, data: Path) -> np.ndarray:
    """Of all texts in a drawn order, uint16 (tokens,)."""
    if not path.exists():
        texts = list(_texts(data))
        order = np.random.default_rng(0).permutation(len(texts))
        end = tokenizer.convert_tokens_to_ids(END)
        encoded = tokenizer([texts[index] for index in order], add_special_tokens=False)["input_ids"]
        np.save(path, np.concatenate([np.array([*ids, end], np.uint16) for ids in encoded]))
    found: np.ndarray = np.load(path)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/small-models"))
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("DLORA_DATA", "../shared/data")))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=sorted(FAMILIES), default=[])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
