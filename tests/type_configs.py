"""Tiny configs for any model type of transformers: sizes by the names that configs have for them."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any, Final

from families import UNUSUAL_FAMILIES, VOCABULARY
from transformers import CONFIG_MAPPING, PreTrainedConfig

_LAYERS: Final = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers",
    "num_encoder_layers", "num_blocks",
)  # fmt: skip
_KINDS_OF_LAYERS: Final = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers")
_NAMES: Final[dict[int, str]] = {
    VOCABULARY: "vocab_size n_token decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size "
    "pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base",
    64: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
    "max_target_positions max_source_positions original_max_position_embeddings",
    24: "intermediate_size ffn_dim d_inner dff dim_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "intermediate_size_mlp dense_intermediate_size n_inner shared_intermediate_size",
    16: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size backbone_hidden_size "
    "input_embedding_size output_embedding_size dim_model_base out_hidden_size",
    8: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size q_lora_rank "
    "kv_lora_rank o_lora_rank ple_embed_dim hidden_size_per_layer_input adapter_rank laurel_rank "
    "mamba_d_state state_size ssm_state_size chunk_size mamba_chunk_size mamba_d_head mamba_head_dim "
    "mamba_headdim hc_lowrank",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
    "mamba_n_heads mamba_num_heads index_n_heads linear_num_heads head_dim global_head_dim "
    "attention_head_dim dim_head d_head d_kv kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "swa_head_dim index_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim rotary_dim "
    "num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank mamba_dt_rank "
    "sliding_window sliding_window_size window_size attention_chunk_size index_topk block_size "
    "split_ngram_parts",
    2: "num_key_value_heads swa_num_key_value_heads num_global_key_value_heads linear_num_key_heads "
    "linear_num_value_heads num_query_groups num_experts_per_tok num_experts_per_token moe_k moe_topk "
    "top_k_experts heads_per_ngram o_groups hc_count hc_mult",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers n_groups mamba_n_groups mamba_ngroups bos_token_id",
}  # fmt: skip
SIZES: Final = {name: size for size, names in _NAMES.items() for name in names.split()} | {
    "pad_token_id": 0, "eos_token_id": 2
}  # fmt: skip
_OFTEN_NONE: Final = ("head_dim", "n_routed_experts", "num_experts_per_tok", "n_shared_experts")
AS_DECODER: Final = {"is_decoder": True, "is_encoder_decoder": False, "causal": True}
"""What makes a decoder of a type that is none by its default config."""

_ROPE: Final = {"rope_type": "default", "rope_theta": 10000.0}
_DRAFTER: Final = {
    "model_type": "gemma4_text",
    **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")},
    **{name: SIZES[name] for name in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")},
    **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
    "num_hidden_layers": 6,
}
_INDEXER: Final = {
    **dict.fromkeys(("indexer_n_heads", "indexer_head_dim", "indexer_budget"), 4),
    "indexer_kv_heads": 1,
    "indexer_compress_ratio": 2,
    "linear_num_value_heads": 2,
}
OVERRIDES: Final[dict[str, dict[str, Any]]] = {
    **UNUSUAL_FAMILIES,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v4": {"head_dim": 16, "index_head_dim": 16, "partial_rotary_factor": 0.5},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "doge": {"keep_window_size": 4},
    "dots3_note": {
        "vision_config": {"mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 16, "adapter_out_dim": 16},
        "audio_config": {"adapter_input_size": 16, "adapter_out_dim": 16},
    },
    "gemma4_assistant": {"text_config": _DRAFTER},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        **dict.fromkeys(("index_block_size", "index_topk_blocks", "index_n_heads"), 2),
    },
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}
"""Where names alone do not do."""


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config of a model of a few ten thousand parameters, with every kind of layer that the type has by default."""
    return _shrunk(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **changes})


def decoder_changes(model_type: str) -> dict[str, bool]:
    """What of ``AS_DECODER`` the type has otherwise by default."""
    config = tiny_config(model_type)
    return {name: value for name, value in AS_DECODER.items() if getattr(config, name, None) is (not value)}


def _shrunk(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> PreTrainedConfig:
    try:
        default = kind()
    except Exception:  # its own defaults may contradict each other
        default = None
    given: dict[str, Any] = {}
    kinds = _kinds_of_layers(default)
    layers = len(next(iter(kinds.values()), (0, 0)))
    for field in fields(kind):
        value = _default_of(default, field)
        if field.name in kind.sub_configs and isinstance(value, PreTrainedConfig):
            part = changes.pop(field.name, {})
            given[field.name] = part if isinstance(part, PreTrainedConfig) else _shrunk(type(value), dict(part))
        elif field.name in _LAYERS:
            given[field.name] = layers
        elif field.name in kinds:
            given[field.name] = kinds[field.name]
        elif field.name in SIZES and (value is not None or field.name in _OFTEN_NONE) and not isinstance(value, bool):
            given[field.name] = SIZES[field.name]
        elif field.name.endswith(("_token_id", "_index")) and isinstance(value, int) and value >= VOCABULARY:
            given[field.name] = SIZES["eos_token_id"]  # of images and sounds: no text of ours has it
    if "kv_lora_rank" in given:  # latent attention has as many keys as queries
        given["num_key_value_heads"] = given["num_attention_heads"]
    return kind(**{**given, **changes})


def _default_of(default: PreTrainedConfig | None, field: Field[Any]) -> Any:
    try:
        return field.default if default is None else getattr(default, field.name)
    except Exception:  # one that differs by layer
        return field.default


def _kinds_of_layers(default: PreTrainedConfig | None) -> dict[str, list[Any]]:
    """Of the lists of what each layer is, the first layer of each kind; two layers where there are no such lists."""
    lists = {name: list(getattr(default, name, None) or ()) for name in _KINDS_OF_LAYERS}
    lists = {name: kinds for name, kinds in lists.items() if kinds}
    first = {kinds.index(kind) for kinds in lists.values() for kind in kinds}
    length = min(map(len, lists.values()), default=0)
    chosen = sorted({*first, *range(length - 2 + len(first), length)})
    return {name: [kinds[index] for index in chosen] for name, kinds in lists.items() if len(kinds) == length}
