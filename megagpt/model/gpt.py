"""The decoder-only GPT; one class spans GPT-2 and Llama.

A model may be one stage of a pipeline: it then holds a part of the modules, under the same
canonical names, which checkpoints and initialisation use.
Next files: `attention.py`, `mlp.py`, `initialization.py`, `pipeline.py`, `megagpt/kernels/`.
"""

# b micro-batch, s sequence, h hidden, v padded vocabulary; "/tp" marks a local shard, s/tp only
# under sequence parallelism

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.config.schema import ModelConfig, Recompute
from megagpt.kernels.attention.contract import Documents
from megagpt.kernels.dropout.reference import dropout
from megagpt.kernels.linear_cross_entropy.contract import Vocabulary
from megagpt.kernels.registry import REFERENCE, Kernels
from megagpt.model.attention import (
    Attention,
    KVCache,
    SequenceContext,
    rotary_tables,
)
from megagpt.model.dropout import Site
from megagpt.model.layers import (
    ONE_RANK,
    TensorParallel,
    VocabParallelEmbedding,
    empty_parameter,
)
from megagpt.model.mlp import MLP
from megagpt.model.norm import Norm
from megagpt.model.recompute import call
from megagpt.parallel.collectives import copy_to_group
from megagpt.parallel.groups import Group, group_rank, group_size
from megagpt.parallel.partition import PipelineStage, whole_model


class PositionEmbedding(nn.Module):
    """Learned absolute positions, as in GPT-2.

    `split_group` is the group over whose ranks positions are split (sequence parallelism): the
    parts of the gradient are summed over it.
    """

    def __init__(self, config: ModelConfig, *, split_group: Group) -> None:
        super().__init__()
        self.split_group = split_group
        self.weight = nn.Parameter(torch.empty(config.seq_length, config.hidden_size))

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """[s] or [b, s] -> [.., s, h], or a rank's share of them, [.., s/tp, h]."""
        group = self.split_group
        own = position_ids.chunk(group_size(group), dim=-1)[group_rank(group)]
        return F.embedding(own, copy_to_group(self.weight, group))


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the model has them."""

    def __init__(self, config: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        rows = config.padded_vocab_size(tp.size)
        self.word = VocabParallelEmbedding(rows, config.hidden_size, tp=tp)
        self.position = None
        if config.position_embedding == "learned":
            self.position = PositionEmbedding(config, split_group=tp.stream_group)

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """[b, s] tokens, [s] or [b, s] positions -> [b, s, h], or [b, s/tp, h]."""
        x = self.word(tokens)
        return x if self.position is None else x + self.position(position_ids)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        config: Model shape.
        tp: What splits each layer, and under sequence parallelism input and output.
        layer: Index of the block.
        recompute: What backward computes again instead of keeping it: the whole block (`full`),
            the activation's product in the MLP, its largest tensor (`selective`), or nothing.
        kernels: Chooses those of its layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        *,
        layer: int,
        recompute: Recompute,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.recompute = recompute == "full"
        h = config.hidden_size
        self.attention_norm = Norm(config, h, split_group=tp.stream_group, kernels=kernels)
        self.attention = Attention(config, tp, layer=layer, kernels=kernels)
        self.mlp_norm = Norm(config, h, split_group=tp.stream_group, kernels=kernels)
        self.mlp = MLP(config, tp, recompute=recompute == "selective", kernels=kernels)

    def forward(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """[b, s, h] -> [b, s, h], s/tp under sequence parallelism."""
        return call(self._forward, x, context, recompute=self.recompute)

    def _forward(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        attended = self.attention(self.attention_norm(x)[0], context)
        attended = context.drop(attended, layer=self.layer, site=Site.ATTENTION)
        normed, x = self.mlp_norm(attended, residual=x)
        return x + context.drop(self.mlp(normed), layer=self.layer, site=Site.MLP)


class LanguageModelHead(nn.Module):
    """The output layer: hands hidden states and its weight to the loss.

    Its weight is its own, or the word embedding's; being registered here too, ZeRO-3 gathers it.
    On the last stage of a pipeline a tied weight is a copy, whose gradient is summed with the first
    stage's.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        *,
        tied_weight: nn.Parameter | None,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        assert config.vocab_size is not None
        self.tp = tp
        self.z_loss = config.z_loss
        rows = config.padded_vocab_size(tp.size) // tp.size
        group = tp.group if tp.size > 1 else None
        self.vocabulary = Vocabulary(config.vocab_size, first=tp.rank * rows, group=group)
        self.linear_cross_entropy = kernels.choose(
            "linear_cross_entropy", size=config.hidden_size, rows=rows
        )
        if tied_weight is None:
            self.weight = empty_parameter(rows, config.hidden_size, tp_dim=0)
        else:
            self.weight = tied_weight

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None, *, gradient: float = 1.0
    ) -> torch.Tensor:
        """[b, s, h] -> loss [b, s]; without labels, logits over real tokens; at least float32.

        Logits are [b, s, vocab_size], and need the whole vocabulary on this rank. In training mode
        the loss holds the z-loss; `gradient` is what backward will hand to each token's loss.
        """
        if labels is None:
            assert self.tp.size == 1, "logits are for inference, at tp = 1"
            logits = F.linear(hidden, self.weight)[..., : self.vocabulary.size]
            return logits.to(torch.promote_types(logits.dtype, torch.float32))
        hidden = self.tp.enter(hidden)  # [b, s, h], under sequence parallelism too
        loss = self.linear_cross_entropy(
            hidden.flatten(0, 1),
            self.weight,
            labels.flatten(),
            vocabulary=self.vocabulary,
            z_loss=self.z_loss if self.training else 0.0,
            gradient=gradient,
        )
        return loss.view(labels.shape)


class GPTModel(nn.Module):
    """A GPT; `initialization.initialize` or a state dict fills its empty parameters.

    Args:
        config: Shape; vocab_size must be set.
        tp: What splits each layer; default nothing.
        recompute: What backward computes again, see `Block`.
        stage: Part of the model to hold; default all of it.
        kernels: Chooses those of the layers; default the definitions.

    Attributes:
        loss_gradient: What backward will hand to each token's loss, as far as the caller knows; the
            loss is fastest where it is true.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel = ONE_RANK,
        *,
        recompute: Recompute = "none",
        stage: PipelineStage | None = None,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.config = config
        self.loss_gradient = 1.0
        self.dropout = kernels.choose("dropout") if config.dropout else dropout
        self.stage = stage = stage or whole_model(config)
        self.stream_group = tp.stream_group
        tied_weight = None
        if stage.is_first:
            self.embedding = Embedding(config, tp)
            tied_weight = self.embedding.word.weight if config.tie_embeddings else None
        # By global index, so that names are the same on every layout.
        self.layers = nn.ModuleDict(
            {
                str(i): Block(config, tp, layer=i, recompute=recompute, kernels=kernels)
                for i in range(stage.first_layer, stage.end_layer)
            }
        )
        if stage.is_last:
            self.final_norm = Norm(
                config, config.hidden_size, split_group=tp.stream_group, kernels=kernels
            )
            self.lm_head = LanguageModelHead(config, tp, tied_weight=tied_weight, kernels=kernels)

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
        document_offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Loss of each token, of a whole model.

        Args:
            tokens: [b, s], int64.
            labels: [b, s], int64: the next tokens, or IGNORE_INDEX.
            position_ids: [b, s], int64, 0 where a document begins; attention then stays within
                documents. Default: 0 to s - 1, one document.
            dropout_keys: [b], from `dropout_keys`; dropped is in training mode only.
            document_offsets: [documents + 1], int32, see `Documents.offsets`; a GPU that is not
                given them with position ids makes the host wait.

        Returns:
            [b, s], at least float32, nats; 0 where the label is IGNORE_INDEX.
        """
        context = self.context(
            tokens.shape[1],
            tokens.device,
            position_ids=position_ids,
            dropout_keys=dropout_keys,
            document_offsets=document_offsets,
        )
        hidden = self.hidden_states(tokens, context)
        return self.lm_head(hidden, labels, gradient=self.loss_gradient)

    def logits(self, tokens: torch.Tensor, kv_cache: KVCache | None = None) -> torch.Tensor:
        """Logits of the next token at each position, at tp = 1.

        Args:
            tokens: [b, s]; with a cache, only those that follow the ones it holds.
            kv_cache: Extended in place.

        Returns:
            [b, s, vocab_size], at least float32, without the padding of the vocabulary.
        """
        context = self.context(tokens.shape[1], tokens.device, cache=kv_cache)
        return self.lm_head(self.hidden_states(tokens, context), None)

    def context(
        self,
        length: int,
        device: torch.device,
        *,
        position_ids: torch.Tensor | None = None,
        dropout_keys: torch.Tensor | None = None,
        document_offsets: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> SequenceContext:
        """What the blocks share in one pass over tokens, which follow those of the cache.

        Raises:
            ValueError: If they are more than seq_length together.
        """
        start = 0 if cache is None else cache.length
        end = start + length
        if end > self.config.seq_length:
            raise ValueError(
                f"{end} tokens are more than seq_length={self.config.seq_length}; give fewer"
            )
        positions = (
            torch.arange(start, end, device=device) if position_ids is None else position_ids
        )
        documents = None
        if position_ids is not None:
            documents = Documents(position_ids, document_offsets)
        rotary = None
        if self.config.position_embedding == "rope":
            dtype = next(self.parameters()).dtype
            rotary = rotary_tables(positions, self.config.head_size, self.config.rope_theta, dtype)
        return SequenceContext(
            positions=positions,
            rotary=rotary,
            documents=documents,
            dropout_keys=dropout_keys if self.training else None,
            dropout_probability=self.config.dropout,
            dropout=self.dropout,
            stream_group=self.stream_group,
            cache=cache,
        )

    def hidden_states(self, x: torch.Tensor, context: SequenceContext) -> torch.Tensor:
        """What leaves this stage: embedding on the first, its blocks, final norm on the last.

        Args:
            x: Tokens [b, s] on the first stage, else the hidden states that left the one before.
            context: From `context`.

        Returns:
            [b, s, h], s/tp under sequence parallelism.
        """
        if self.stage.is_first:
            embedded = self.embedding(x, context.positions)
            x = context.drop(embedded, layer=0, site=Site.EMBEDDING)
        for layer in self.layers.values():
            x = layer(x, context)
        return self.final_norm(x)[0] if self.stage.is_last else x


def count_parameters(config: ModelConfig) -> int:
    """Weights of the model without the padding of the vocabulary, tied ones once."""
    assert config.vocab_size is not None
    with torch.device("meta"):
        model = GPTModel(config)
    padding = config.padded_vocab_size() - config.vocab_size
    copies = 1 if config.tie_embeddings else 2
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - copies * padding * config.hidden_size
