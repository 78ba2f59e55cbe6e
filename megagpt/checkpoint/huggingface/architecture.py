"""A model's settings in Hugging Face's words: its architecture and its config.json.

GPT-2, Llama, and Qwen3, which is Llama with qk_norm. Knows no files.
Next file: `names.py`, for the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from megagpt.config.schema import ModelConfig

Architecture = Literal["gpt2", "llama", "qwen3"]

_CLASSES: dict[Architecture, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SETTINGS: dict[Architecture, dict[str, Any]] = {
    "gpt2": {"normalization": "layernorm", "activation": "gelu", "bias": True, "qk_norm": False},
    "llama": {"normalization": "rmsnorm", "activation": "swiglu"},
    "qwen3": {"normalization": "rmsnorm", "activation": "swiglu", "bias": False},
}
"""Settings that an architecture fixes, beside position_embedding and qk_norm, which choose it."""

_FIXED: dict[Architecture, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "add_cross_attention": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "scale_attn_weights": (True,),
    },
    "llama": {"hidden_act": ("silu",)},
    "qwen3": {
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
    },
}
"""Values of config.json that our model computes; the first is what an absent one means."""

_FIXED_ALWAYS: dict[str, tuple[Any, ...]] = {"auto_map": (None,), "quantization_config": (None,)}


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture that computes a model.

    Raises:
        ValueError: If there is none, with the setting that stands in the way.
    """
    if config.position_embedding == "learned":
        architecture: Architecture = "gpt2"
    else:
        architecture = "qwen3" if config.qk_norm else "llama"
    settings = dict(_SETTINGS[architecture])
    if architecture == "gpt2":
        settings["kv_heads"] = config.num_attention_heads
    for name, value in settings.items():
        found = getattr(config, name)
        if found != value:
            name = "num_kv_heads" if name == "kv_heads" else name
            raise ValueError(
                f"model.{name}={found}, but Hugging Face's {architecture}, the nearest to this "
                f"model, has {name}={value}; train with {name}={value} to export, or use the "
                "model with megagpt generate"
            )
    return architecture


def config_json(config: ModelConfig, *, dtype: str, eos_token_id: int | None) -> dict[str, Any]:
    """The config.json of a model.

    Args:
        config: With vocab_size.
        dtype: Of the weights, in torch's words.
        eos_token_id: The token that ends a document, where the tokenizer is known.
    """
    architecture = architecture_of(config)
    common = {
        "architectures": [_CLASSES[architecture]],
        "model_type": architecture,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": None,  # their defaults may lie outside of the vocabulary
        "eos_token_id": eos_token_id,
    }
    if architecture == "gpt2":
        return common | {
            "n_positions": config.seq_length,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_attention_heads,
            "n_inner": config.ffn_size,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_eps,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": 0.0,
        }
    values = common | {
        "max_position_embeddings": config.seq_length,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.bias,
        "attention_dropout": 0.0,
        # Read by version 4; version 5 moves it into rope_parameters.
        "rope_theta": config.rope_theta,
    }
    return values if architecture == "qwen3" else values | {"mlp_bias": config.bias}


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a config.json describes; dropout is 0, for it is no part of the function.

    Raises:
        ValueError: If our model cannot compute it, with the setting that stands in the way.
    """
    architecture = next((a for a in _CLASSES if a == values.get("model_type")), None)
    if architecture is None:
        raise ValueError(
            f"config.json has model_type={values.get('model_type')}, this reads "
            f"{', '.join(_CLASSES)}; import a model of one of these"
        )
    for name, allowed in (_FIXED[architecture] | _FIXED_ALWAYS).items():
        found = values.get(name, allowed[0])
        if found not in allowed:
            raise _unsupported(name, found, " or ".join(map(str, allowed)))
    if architecture == "gpt2":
        hidden_size = _whole(values, "n_embd")
        return ModelConfig(
            num_layers=_whole(values, "n_layer"),
            hidden_size=hidden_size,
            num_attention_heads=_whole(values, "n_head"),
            ffn_hidden_size=_whole(values, "n_inner", 4 * hidden_size),
            seq_length=_whole(values, "n_positions"),
            vocab_size=_whole(values, "vocab_size"),
            norm_eps=_number(values, "layer_norm_epsilon", 1e-5),
            tie_embeddings=_flag(values, "tie_word_embeddings", default=True),
        )
    heads, hidden_size = _whole(values, "num_attention_heads"), _whole(values, "hidden_size")
    head_size = values.get("head_dim", 128 if architecture == "qwen3" else None)
    if head_size is not None and head_size * heads != hidden_size:
        raise _unsupported("head_dim", head_size, f"hidden_size / heads = {hidden_size / heads:g}")
    bias = _flag(values, "attention_bias", default=False)
    if architecture == "llama" and _flag(values, "mlp_bias", default=False) != bias:
        raise _unsupported("mlp_bias", not bias, f"attention_bias={bias}")
    for kind in values.get("layer_types") or ():
        if kind != "full_attention":
            raise _unsupported("layer_types", kind, "full_attention")
    return ModelConfig(
        num_layers=_whole(values, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_attention_heads=heads,
        num_kv_heads=_whole(values, "num_key_value_heads", heads),
        ffn_hidden_size=_whole(values, "intermediate_size"),
        seq_length=_whole(values, "max_position_embeddings"),
        vocab_size=_whole(values, "vocab_size"),
        normalization="rmsnorm",
        norm_eps=_number(values, "rms_norm_eps", 1e-6),
        position_embedding="rope",
        rope_theta=_rope_theta(values),
        activation="swiglu",
        bias=bias,
        qk_norm=architecture == "qwen3",
        tie_embeddings=_flag(values, "tie_word_embeddings", default=False),
    )


def _rope_theta(values: Mapping[str, Any]) -> float:
    """The base of the frequencies; refuses what else may be done to them.

    Version 4 has `rope_theta` and, where frequencies are scaled, `rope_scaling`; version 5 has all
    in `rope_parameters`.
    """
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        if not isinstance(rope, Mapping):
            raise _unsupported(name, rope, "null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        more = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or more:
            raise _unsupported(name, dict(rope), "the plain frequencies")
        factor = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
        if factor != 1:
            raise _unsupported("partial_rotary_factor", factor, "1")
        if "rope_theta" in rope:
            return _number(rope, "rope_theta")
    return _number(values, "rope_theta", 10000.0)


def _unsupported(name: str, found: Any, allowed: str) -> ValueError:
    return ValueError(
        f"config.json has {name}={found}, which megagpt's model does not compute (it has "
        f"{allowed}); import a model without it"
    )


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    found = values.get(name)
    if found is None:
        found = default
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise ValueError(f"config.json has {name}={found}; give a number, as its model had")
    return float(found)


def _whole(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    number = _number(values, name, default)
    if not number.is_integer():
        raise ValueError(f"config.json has {name}={number}; give a whole number, as its model had")
    return int(number)


def _flag(values: Mapping[str, Any], name: str, *, default: bool) -> bool:
    found = values.get(name, default)
    if not isinstance(found, bool):
        raise ValueError(f"config.json has {name}={found}; give true or false, as its model had")
    return found
