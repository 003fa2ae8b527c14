"""Tiny models with random weights, one of each family that dlora promises, and the differences that matter kept.

Gemma scales embeddings and caps logits, Cohere and Granite scale logits, GPT-2 has ``Conv1D``, OPT projects in and out,
BLOOM, GPT-NeoX, Falcon and Phi-3 fuse projections, some tie the head and some have a bias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY: Final = 97  # divisible by no number of slabs
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<s>{{ message['role'] }} {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)

_PLAIN: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_WITHOUT_GROUPS: Final = {key: value for key, value in _PLAIN.items() if key != "num_key_value_heads"}
_GEMMA: Final = {**_PLAIN, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4}
_TOKENS: Final = {key: _PLAIN[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}

FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "llama": _PLAIN,
    "qwen2": {**_PLAIN, "tie_word_embeddings": True},
    "qwen3": {**_PLAIN, "head_dim": 8},
    "mistral": {**_PLAIN, "sliding_window": 4},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": _PLAIN,
    "gpt2": {**_TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        **_TOKENS, "hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 8, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
    "bloom": {**_TOKENS, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "gpt_neox": {**_WITHOUT_GROUPS, "rotary_pct": 0.5},
    "falcon": {**_TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    "granite": {
        **_PLAIN, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "cohere": {**_PLAIN, "logit_scale": 0.25},
    "olmo2": _PLAIN,
    "stablelm": {**_PLAIN, "use_qkv_bias": True},
}  # fmt: skip
"""Hugging Face ``model_type`` to the arguments of its config."""


_WITH_HEAD_DIM: Final = {**_PLAIN, "head_dim": 4}
_EXPERTS: Final = {
    **_WITH_HEAD_DIM,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
}
_MAMBA: Final = {"state_size": 4, "time_step_rank": 4}
_LINEAR_ATTENTION: Final = {
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 4),
    "layer_types": ["linear_attention", "full_attention"],
}

_PLAIN_ONES: Final = (
    "apertus", "arcee", "bitnet", "biogpt", "cohere2", "cwm", "diffllama", "ernie4_5", "exaone4", "gemma", "glm",
    "glm4", "gpt_bigcode", "helium", "hunyuan_v1_dense", "jais2", "mpt", "nanochat", "nemotron", "olmo", "olmo3",
    "openai-gpt", "persimmon", "phi", "seed_oss", "smollm3", "starcoder2", "vaultgemma",
)  # fmt: skip
_MIXTURES: Final = (
    "glm4_moe", "gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
)  # fmt: skip

MORE_FAMILIES: Final[dict[str, dict[str, Any]]] = {
    **dict.fromkeys(_PLAIN_ONES, _WITH_HEAD_DIM),
    **dict.fromkeys(_MIXTURES, _EXPERTS),
    "qwen3_next": {**_EXPERTS, **_LINEAR_ATTENTION, "head_dim": 8},
    "mamba": {**_PLAIN, **_MAMBA},
    "falcon_mamba": {**_PLAIN, **_MAMBA},
    "falcon_h1": {
        **_PLAIN, "mamba_d_ssm": 32, "mamba_n_heads": 4, **dict.fromkeys(("mamba_d_head", "mamba_d_state"), 8),
        "mamba_chunk_size": 8,
    },
    "jamba": {**_EXPERTS, "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
}  # fmt: skip
"""As ``FAMILIES``: those that fewer tests run over."""

_BLT_PART: Final = {
    key: value for key, value in _WITH_HEAD_DIM.items() if key not in _TOKENS and key != "num_key_value_heads"
}

REFUSED_FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "bert": _PLAIN,
    "blt": {
        **_TOKENS,
        "max_position_embeddings": 64,
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [2],
        "patcher_config": {**_BLT_PART, "vocab_size": VOCABULARY},
        "encoder_config": {**_BLT_PART, "vocab_size": VOCABULARY, "hidden_size_global": 16},
        "decoder_config": {**_BLT_PART, "vocab_size": VOCABULARY, "hidden_size_global": 16},
        "global_config": _BLT_PART,
    },
    "recurrent_gemma": {**_PLAIN, "lru_width": 16, "head_dim": 4},
    "roberta": _PLAIN,
    "t5": {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4},
}
"""As ``FAMILIES``: what dlora says no to."""

UNUSUAL_FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "axk2": {
        **_EXPERTS,
        "num_key_value_heads": 4,
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
        **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim", "index_n_heads"), 4),
    },
    "reformer": {
        **_TOKENS, "hidden_size": 16, "attention_head_size": 4, "num_attention_heads": 4, "feed_forward_size": 24,
        "max_position_embeddings": 64, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 8],
        "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2,
        "is_decoder": True,
    },
}  # fmt: skip
"""As ``FAMILIES``: nothing is promised of them; their code differs so much from others' that it may fail anywhere."""

ALL_FAMILIES: Final = FAMILIES | MORE_FAMILIES | REFUSED_FAMILIES | UNUSUAL_FAMILIES


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A float32 model of about 10,000 parameters in eval mode; ``changes`` go to its config.

    Weights are a good deal larger than at a usual initialisation, so that every part of the model shows.
    """
    return random_model(CONFIG_MAPPING[family](**{**ALL_FAMILIES[family], **changes}), seed)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """As ``tiny_model``, of any config."""
    torch.manual_seed(seed)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of ``VOCABULARY`` tokens: ``<pad> <s> </s> <unk>``, roles, and ``w0``, ``w1``, …"""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "system"]
    words += [f"w{index}" for index in range(VOCABULARY - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(directory: Path, family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write a tiny model and its tokenizer as ``save_pretrained`` does; returns the model."""
    model = tiny_model(family, seed, **changes)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return model
