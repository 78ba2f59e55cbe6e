"""The decoder-only GPT; one class spans GPT-2 and Llama.

A model may be one stage of a pipeline: it then holds a part of the modules, under the same
canonical names, which checkpoints and initialisation use.
Next files: `attention.py`, `mlp.py`, `loss.py`, `initialization.py`, `pipeline.py`.
"""

# b micro-batch, s sequence, h hidden, v padded vocabulary; "/tp" marks a local shard, s/tp only
# under sequence parallelism

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from megagpt.config.schema import ModelConfig, Recompute
from megagpt.model.attention import (
    Attention,
    KVCache,
    SequenceContext,
    document_mask,
    rotary_tables,
)
from megagpt.model.dropout import Site, keyed_dropout
from megagpt.model.layers import VocabParallelEmbedding, empty_parameter
from megagpt.model.loss import linear_cross_entropy
from megagpt.model.mlp import MLP
from megagpt.model.norm import build_norm
from megagpt.parallel.collectives import copy_to_group
from megagpt.parallel.groups import Group, group_rank, group_size
from megagpt.parallel.partition import PipelineStage, whole_model


class PositionEmbedding(nn.Module):
    """Learned absolute positions, as in GPT-2.

    `split_group` is the group over whose ranks positions are split (sequence parallelism): the
    parts of the gradient are summed over it.
    """

    def __init__(self, seq_length: int, hidden_size: int, *, split_group: Group = None) -> None:
        super().__init__()
        self.split_group = split_group
        self.weight = nn.Parameter(torch.empty(seq_length, hidden_size))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[s] or [b, s] -> [.., s, h]."""
        return F.embedding(position_ids, copy_to_group(self.weight, self.split_group))


def _own_positions(position_ids: torch.Tensor, tp_group: Group) -> torch.Tensor:
    """This tensor-parallel rank's share of the sequence, [.., s] -> [.., s/tp]."""
    return position_ids.chunk(group_size(tp_group), dim=-1)[group_rank(tp_group)]


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the model has them."""

    def __init__(
        self, config: ModelConfig, *, tp_group: Group, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.split_group = tp_group if sequence_parallel else None
        rows = config.padded_vocab_size(group_size(tp_group))
        self.word = VocabParallelEmbedding(
            rows, config.hidden_size, tp_group=tp_group, sequence_parallel=sequence_parallel
        )
        self.position = None
        if config.position_embedding == "learned":
            self.position = PositionEmbedding(
                config.seq_length, config.hidden_size, split_group=self.split_group
            )

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] tokens, [s] or [b, s] positions -> [b, s, h], or [b, s/tp, h]."""
        x = self.word(tokens)
        if self.position is None:
            return x
        return x + self.position(_own_positions(position_ids, self.split_group))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: Model shape.
        layer: Index of the block.
        tp_group: Group that splits each layer; None for one rank.
        sequence_parallel: Whether input and output are split over s.
        recompute: What backward computes again instead of keeping it: the whole block (`full`),
            scores and softmax of attention (`selective`), or nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        layer: int,
        tp_group: Group,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.tp_group = tp_group
        self.recompute = recompute == "full"
        self.split_group = tp_group if sequence_parallel else None
        self.attention_norm = build_norm(config, config.hidden_size, split_group=self.split_group)
        self.attention = Attention(
            config,
            layer=layer,
            tp_group=tp_group,
            sequence_parallel=sequence_parallel,
            recompute=recompute == "selective",
        )
        self.mlp_norm = build_norm(config, config.hidden_size, split_group=self.split_group)
        self.mlp = MLP(config, tp_group=tp_group, sequence_parallel=sequence_parallel)

    def forward(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """[b, s, h] -> [b, s, h], s/tp under sequence parallelism."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._forward, x, context, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(x, context)

    def _forward(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        x = x + self._drop(self.attention(self.attention_norm(x), context), context, Site.ATTENTION)
        return x + self._drop(self.mlp(self.mlp_norm(x)), context, Site.MLP)

    def _drop(self, x: torch.Tensor, context: SequenceContext, site: Site) -> torch.Tensor:
        return keyed_dropout(
            x,
            context.dropout_keys,
            probability=self.dropout,
            layer=self.layer,
            site=site,
            sequence_start=group_rank(self.split_group) * x.shape[1],
        )


class LanguageModelHead(nn.Module):
    """The output layer: hands hidden states and its weight to the loss.

    Its weight is its own, or the word embedding's; being registered here too, ZeRO-3 gathers it.
    On the last stage of a pipeline a tied weight is a copy, whose gradient is summed with the first
    stage's.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tp_group: Group,
        sequence_parallel: bool = False,
        tied_weight: nn.Parameter | None,
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.vocab_size = config.vocab_size
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel
        if tied_weight is None:
            tp = group_size(tp_group)
            rows = config.padded_vocab_size(tp) // tp
            self.weight = empty_parameter(rows, config.hidden_size, tp_dim=0)
        else:
            self.weight = tied_weight

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """[b, s, h] -> loss [b, s]; without labels, logits over real tokens; at least float32.

        Logits are [b, s, vocab_size], and need the whole vocabulary on this rank.
        """
        if labels is None:
            assert group_size(self.tp_group) == 1, "logits are for inference, at tp = 1"
            logits = F.linear(hidden, self.weight)[..., : self.vocab_size]
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        return linear_cross_entropy(
            hidden,
            self.weight,
            labels,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
        )


class GPTModel(nn.Module):
    """A GPT; `initialization.initialize` or a state dict fills its empty parameters.

    Args:
        config: Shape; vocab_size must be set.
        tp_group: Group that splits each layer; None for one rank.
        sequence_parallel: Whether norms and the residual stream are split over s on tp_group.
        recompute: What backward computes again, see `Block`.
        stage: Part of the model to hold; default all of it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tp_group: Group = None,
        sequence_parallel: bool = False,
        recompute: Recompute = "none",
        stage: PipelineStage | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.stage = stage = stage or whole_model(config)
        self.split_group = tp_group if sequence_parallel else None
        tied_weight = None
        if stage.is_first:
            self.embedding = Embedding(
                config, tp_group=tp_group, sequence_parallel=sequence_parallel
            )
            tied_weight = self.embedding.word.weight if config.tie_embeddings else None
        # By global index, so that names are the same on every layout.
        self.layers = nn.ModuleDict(
            {
                str(i): Block(
                    config,
                    layer=i,
                    tp_group=tp_group,
                    sequence_parallel=sequence_parallel,
                    recompute=recompute,
                )
                for i in range(stage.first_layer, stage.end_layer)
            }
        )
        if stage.is_last:
            self.final_norm = build_norm(config, config.hidden_size, split_group=self.split_group)
            self.lm_head = LanguageModelHead(
                config,
                tp_group=tp_group,
                sequence_parallel=sequence_parallel,
                tied_weight=tied_weight,
            )

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of this stage once, by its global name."""
        for name, parameter in self.named_parameters():
            if name == "lm_head.weight" and self.config.tie_embeddings:
                name = "embedding.word.weight"  # the last stage's copy
            yield name, parameter

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        dropout_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each token, of a whole model.

        Args:
            tokens: [b, s], int64.
            labels: [b, s], int64: the next tokens, or IGNORE_INDEX.
            position_ids: [b, s], int64, 0 where a document begins; attention then stays within
                documents. Default: 0 to s - 1, one document.
            dropout_keys: [b], from `dropout_keys`; dropped is in training mode only.

        Returns:
            [b, s], at least float32, nats; 0 where the label is IGNORE_INDEX.
        """
        context = self.context(
            tokens.shape[1], tokens.device, position_ids=position_ids, dropout_keys=dropout_keys
        )
        x = self.embed(tokens, position_ids, context)
        return self.lm_head(self.run_layers(x, context), labels)

    def logits(self, tokens: torch.Tensor, kv_cache: KVCache | None = None) -> torch.Tensor:
        """Logits of the next token at each position, at tp = 1.

        Args:
            tokens: [b, s]; with a cache, only those that follow the ones it holds.
            kv_cache: Extended in place.

        Returns:
            [b, s, vocab_size], at least float32, without the padding of the vocabulary.
        """
        start = 0 if kv_cache is None else kv_cache.length
        context = self.context(tokens.shape[1], tokens.device, start=start, cache=kv_cache)
        x = self.embed(tokens, None, context, start=start)
        return self.lm_head(self.run_layers(x, context), None)

    def context(
        self,
        length: int,
        device: torch.device,
        *,
        start: int = 0,
        position_ids: torch.Tensor | None = None,
        dropout_keys: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> SequenceContext:
        """What the blocks share in one pass over tokens start to start + length - 1.

        Raises:
            ValueError: If that is more than seq_length.
        """
        end = start + length
        if end > self.config.seq_length:
            raise ValueError(
                f"{end} tokens are more than seq_length={self.config.seq_length}; give fewer"
            )
        positions = (
            torch.arange(start, end, device=device) if position_ids is None else position_ids
        )
        rotary = None
        if self.config.position_embedding == "rope":
            dtype = next(self.parameters()).dtype
            rotary = rotary_tables(positions, self.config.head_size, self.config.rope_theta, dtype)
        return SequenceContext(
            rotary=rotary,
            mask=None if position_ids is None else document_mask(position_ids),
            dropout_keys=dropout_keys if self.training else None,
            cache=cache,
        )

    def embed(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor | None,
        context: SequenceContext,
        *,
        start: int = 0,
    ) -> torch.Tensor:
        """[b, s] -> [b, s, h], or [b, s/tp, h]; on the first stage."""
        if position_ids is None:
            position_ids = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens, position_ids)
        return keyed_dropout(
            x,
            context.dropout_keys,
            probability=self.config.dropout,
            layer=0,
            site=Site.EMBEDDING,
            sequence_start=group_rank(self.split_group) * x.shape[1],
        )

    def run_layers(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """This stage's blocks, and on the last stage the final norm; shapes as in `Block`."""
        for layer in self.layers.values():
            x = layer(x, context)
        return self.final_norm(x) if self.stage.is_last else x


def count_parameters(config: ModelConfig) -> int:
    """Weights of the model without the padding of the vocabulary, tied ones once."""
    assert config.vocab_size is not None
    with torch.device("meta"):
        model = GPTModel(config)
    padding = config.padded_vocab_size() - config.vocab_size
    copies = 1 if config.tie_embeddings else 2
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - copies * padding * config.hidden_size
