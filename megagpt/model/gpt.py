"""The decoder-only GPT; one class spans GPT-2 and Llama.

Parameter names are the canonical global names of checkpoints and initialisation.
Next files: `attention.py`, `mlp.py`, `loss.py`, `initialization.py`.
"""

# b micro-batch, s sequence, h hidden, v padded vocabulary

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.model.attention import Attention, KVCache, rotary_tables
from megagpt.model.layers import VocabParallelEmbedding, empty_parameter
from megagpt.model.loss import linear_cross_entropy
from megagpt.model.mlp import MLP
from megagpt.model.norm import build_norm
from megagpt.parallel.groups import Group, group_size


class PositionEmbedding(nn.Module):
    """Learned absolute positions, as in GPT-2."""

    def __init__(self, seq_length: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(seq_length, hidden_size))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[s] or [b, s] -> [.., s, h]."""
        return F.embedding(position_ids, self.weight)


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the model has them."""

    def __init__(self, config: ModelConfig, *, tp_group: Group) -> None:
        super().__init__()
        rows = config.padded_vocab_size(group_size(tp_group))
        self.word = VocabParallelEmbedding(rows, config.hidden_size, tp_group=tp_group)
        self.position = None
        if config.position_embedding == "learned":
            self.position = PositionEmbedding(config.seq_length, config.hidden_size)

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] -> [b, s, h]."""
        x = self.word(tokens)
        return x if self.position is None else x + self.position(position_ids)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, layer: int, tp_group: Group) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, config.hidden_size)
        self.attention = Attention(config, layer=layer, tp_group=tp_group)
        self.mlp_norm = build_norm(config, config.hidden_size)
        self.mlp = MLP(config, tp_group=tp_group)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]."""
        x = x + self.attention(self.attention_norm(x), rotary, cache)
        return x + self.mlp(self.mlp_norm(x))


class LanguageModelHead(nn.Module):
    """The output layer: hands hidden states and its weight to the loss.

    Its weight is its own, or the word embedding's; being registered here too, ZeRO-3 gathers it.
    """

    def __init__(
        self, config: ModelConfig, *, tp_group: Group, tied_weight: nn.Parameter | None
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.vocab_size = config.vocab_size
        self.tp_group = tp_group
        if tied_weight is None:
            tp = group_size(tp_group)
            rows = config.padded_vocab_size(tp) // tp
            self.weight = empty_parameter(rows, config.hidden_size, tp_dim=0)
        else:
            self.weight = tied_weight

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """[b, s, h] -> loss [b, s] in float32; without labels, float32 logits over real tokens.

        Logits are [b, s, vocab_size], and need the whole vocabulary on this rank.
        """
        if labels is None:
            assert group_size(self.tp_group) == 1, "logits are for inference, at tp = 1"
            return F.linear(hidden, self.weight)[..., : self.vocab_size].float()
        return linear_cross_entropy(
            hidden, self.weight, labels, vocab_size=self.vocab_size, tp_group=self.tp_group
        )


class GPTModel(nn.Module):
    """A GPT; `initialization.initialize` or a state dict fills its empty parameters.

    Args:
        config: Shape; vocab_size must be set.
        tp_group: Group that splits each layer; None for one rank.
    """

    def __init__(self, config: ModelConfig, *, tp_group: Group = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config, tp_group=tp_group)
        self.layers = nn.ModuleList(
            Block(config, layer=i, tp_group=tp_group) for i in range(config.num_layers)
        )
        self.final_norm = build_norm(config, config.hidden_size)
        tied = self.embedding.word.weight if config.tie_embeddings else None
        self.lm_head = LanguageModelHead(config, tp_group=tp_group, tied_weight=tied)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each token.

        Args:
            tokens: [b, s], int64.
            labels: [b, s], int64: the next tokens, or IGNORE_INDEX.

        Returns:
            [b, s], float32, nats; 0 where the label is IGNORE_INDEX.
        """
        return self.lm_head(self._hidden_states(tokens, None), labels)

    def logits(self, tokens: torch.Tensor, kv_cache: KVCache | None = None) -> torch.Tensor:
        """Logits of the next token at each position, at tp = 1.

        Args:
            tokens: [b, s]; with a cache, only those that follow the ones it holds.
            kv_cache: Extended in place.

        Returns:
            [b, s, vocab_size], float32, without the padding of the vocabulary.
        """
        return self.lm_head(self._hidden_states(tokens, kv_cache), None)

    def _hidden_states(self, tokens: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.seq_length:
            raise ValueError(
                f"{end} tokens are more than seq_length={self.config.seq_length}; give fewer"
            )
        position_ids = torch.arange(start, end, device=tokens.device)
        x = self.embedding(tokens, position_ids)  # [b, s, h]
        rotary = None
        if self.config.position_embedding == "rope":
            rotary = rotary_tables(
                position_ids, self.config.head_size, self.config.rope_theta, x.dtype
            )
        for layer in self.layers:
            x = layer(x, rotary, cache)
        return self.final_norm(x)


def count_parameters(config: ModelConfig) -> int:
    """Weights of the model without the padding of the vocabulary, tied ones once."""
    assert config.vocab_size is not None
    with torch.device("meta"):
        model = GPTModel(config)
    padding = config.padded_vocab_size() - config.vocab_size
    copies = 1 if config.tie_embeddings else 2
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - copies * padding * config.hidden_size
