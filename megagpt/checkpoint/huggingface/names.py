"""A model's tensors in Hugging Face's words: names and shapes; knows no files.

Next file: `convert.py`, which moves the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megagpt.checkpoint.huggingface.architecture import Architecture, architecture_of
from megagpt.config.schema import ModelConfig
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import VOCABULARY_WEIGHTS

_PREFIXES: dict[Architecture, str] = {"gpt2": "transformer.", "llama": "model.", "qwen3": "model."}
"""Of the model without its output layer; files of some models leave it out."""

_GPT2_BLOCK = {
    "ln_1": ["attention_norm"],
    "attn.c_attn": ["attention.query", "attention.key", "attention.value"],
    "attn.c_proj": ["attention.output"],
    "ln_2": ["mlp_norm"],
    "mlp.c_fc": ["mlp.up"],
    "mlp.c_proj": ["mlp.down"],
}
_LLAMA_BLOCK = {
    "input_layernorm": ["attention_norm"],
    "post_attention_layernorm": ["mlp_norm"],
    "self_attn.q_norm": ["attention.query_norm"],
    "self_attn.k_norm": ["attention.key_norm"],
    "self_attn.q_proj": ["attention.query"],
    "self_attn.k_proj": ["attention.key"],
    "self_attn.v_proj": ["attention.value"],
    "self_attn.o_proj": ["attention.output"],
    "mlp.gate_proj": ["mlp.gate"],
    "mlp.up_proj": ["mlp.up"],
    "mlp.down_proj": ["mlp.down"],
}
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

# Masks and frequencies that older versions saved beside the weights.
_NO_WEIGHT = re.compile(
    r"h\.\d+\.attn\.(masked_)?bias|layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


@dataclass(frozen=True)
class TensorMap:
    """One of their tensors, and ours that it is made of."""

    theirs: str
    """Name in their files."""
    ours: tuple[str, ...]
    """Canonical names; several stand side by side in the last dim, equally wide."""
    is_transposed: bool = False
    """Whether theirs is [in, out]: GPT-2's Conv1D."""

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of theirs, from that of each of ours."""
        *rows, last = shape[::-1] if self.is_transposed else shape
        return (*rows, last * len(self.ours))


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """Every tensor of a model in their files, in the order of the model."""
    is_gpt2 = architecture_of(config) == "gpt2"
    if is_gpt2:
        blocks, layer, last = _GPT2_BLOCK, "transformer.h", "transformer.ln_f"
        embeddings = {"transformer.wte": "word", "transformer.wpe": "position"}
    else:
        blocks, layer, last = _LLAMA_BLOCK, "model.layers", "model.norm"
        embeddings = {"model.embed_tokens": "word"}
        if not config.qk_norm:
            blocks = {theirs: ours for theirs, ours in blocks.items() if theirs not in _QK_NORMS}
    maps = [
        TensorMap(f"{theirs}.weight", (f"embedding.{ours}.weight",))
        for theirs, ours in embeddings.items()
    ]
    modules = {
        f"{layer}.{i}.{theirs}": [f"layers.{i}.{part}" for part in ours]
        for i in range(config.num_layers)
        for theirs, ours in blocks.items()
    }
    for module, parts in (modules | {last: ["final_norm"]}).items():
        has_bias = config.bias and (is_gpt2 or "norm" not in module)
        for kind in ("weight", "bias") if has_bias else ("weight",):
            is_transposed = is_gpt2 and kind == "weight" and ".c_" in module
            ours_named = tuple(f"{part}.{kind}" for part in parts)
            maps.append(TensorMap(f"{module}.{kind}", ours_named, is_transposed))
    if not config.tie_embeddings:
        maps.append(TensorMap("lm_head.weight", ("lm_head.weight",)))
    return maps


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by canonical name, without the padding of the vocabulary."""
    assert config.vocab_size is not None, "checkpoints hold the resolved configuration"
    with torch.device("meta"):
        model = GPTModel(config)
    shapes = {name: tuple(p.shape) for name, p in model.canonical_parameters()}
    for name in shapes.keys() & set(VOCABULARY_WEIGHTS):
        shapes[name] = (config.vocab_size, config.hidden_size)
    return shapes


def places(names: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """The weights of a folder: their full names, and the names they have there.

    Some files leave out the prefix of the model, and some hold masks and frequencies too.

    Raises:
        ValueError: If a weight is there under both names.
    """
    prefix = _PREFIXES[architecture]
    found: dict[str, str] = {}
    for name in names:
        if _NO_WEIGHT.fullmatch(name.removeprefix(prefix)):
            continue
        full = name if name.startswith((prefix, "lm_head.")) else prefix + name
        if full in found:
            raise ValueError(f"the files hold {full} twice, as {found[full]} and {name}; keep one")
        found[full] = name
    return found
