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
    architecture = architecture_of(config)
    maps = _gpt2_maps(config) if architecture == "gpt2" else _llama_maps(config)
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


def _gpt2_maps(config: ModelConfig) -> list[TensorMap]:
    maps = [
        TensorMap("transformer.wte.weight", ("embedding.word.weight",)),
        TensorMap("transformer.wpe.weight", ("embedding.position.weight",)),
    ]
    modules: list[tuple[str, tuple[str, ...]]] = []
    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}", f"layers.{i}"
        fused = tuple(f"{ours}.attention.{part}" for part in ("query", "key", "value"))
        modules += [
            (f"{theirs}.ln_1", (f"{ours}.attention_norm",)),
            (f"{theirs}.attn.c_attn", fused),
            (f"{theirs}.attn.c_proj", (f"{ours}.attention.output",)),
            (f"{theirs}.ln_2", (f"{ours}.mlp_norm",)),
            (f"{theirs}.mlp.c_fc", (f"{ours}.mlp.up",)),
            (f"{theirs}.mlp.c_proj", (f"{ours}.mlp.down",)),
        ]
    modules.append(("transformer.ln_f", ("final_norm",)))
    for module, parts in modules:
        for kind in ("weight", "bias"):
            is_transposed = kind == "weight" and ".c_" in module
            ours_named = tuple(f"{part}.{kind}" for part in parts)
            maps.append(TensorMap(f"{module}.{kind}", ours_named, is_transposed))
    return maps


def _llama_maps(config: ModelConfig) -> list[TensorMap]:
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.qk_norm:
        norms |= {
            "self_attn.q_norm": "attention.query_norm",
            "self_attn.k_norm": "attention.key_norm",
        }
    linears = {
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    maps = [TensorMap("model.embed_tokens.weight", ("embedding.word.weight",))]
    for i in range(config.num_layers):
        for theirs, ours in (norms | linears).items():
            kinds = ("weight", "bias") if config.bias and theirs in linears else ("weight",)
            maps += [
                TensorMap(f"model.layers.{i}.{theirs}.{kind}", (f"layers.{i}.{ours}.{kind}",))
                for kind in kinds
            ]
    maps.append(TensorMap("model.norm.weight", ("final_norm.weight",)))
    return maps


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
