"""A GPT cut into the stages of DeepSpeed's pipeline (1F1B), one stage a rank.

Each stage is one "layer" of DeepSpeed's `PipelineModule`, so that the cut, the names and the tied
embedding are ours. Between stages travel the hidden states, the labels and, where the run has them,
position ids and dropout keys. The output layer works in the last stage's forward, not in
DeepSpeed's `loss_fn`: gradients of weights used there are cleared under bf16 with ZeRO-1 (0.19.8:
the hook that calls `clear_lp_grads` sits on the forward's output).
Next files: `gpt.py`, and `megagpt/training/train_step.py`, which drives it.
"""

# b micro-batch, s sequence, h hidden; s/tp only under sequence parallelism

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.model.gpt import GPTModel
from megagpt.parallel.partition import PipelineStage
from megagpt.parallel.topology import ParallelTopology


class GPTStage(GPTModel):
    """One stage, called with the tuple that DeepSpeed hands on.

    Args:
        config: As in `GPTModel`.
        has_position_ids: Whether document positions travel along.
        **model_arguments: As in `GPTModel`.
    """

    def __init__(self, config: ModelConfig, *, has_position_ids: bool, **model_arguments) -> None:
        super().__init__(config, **model_arguments)
        self.has_position_ids = has_position_ids

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | torch.Tensor:  # type: ignore[override]
        """(tokens or hidden states, labels, position ids?, dropout keys?) -> the next one's inputs.

        The last stage returns the loss of each token, [b, s].
        """
        first, labels, *rest = inputs
        position_ids = rest[0] if self.has_position_ids else None
        keys = rest[-1] if len(rest) > self.has_position_ids else None
        context = self.context(
            labels.shape[1], first.device, position_ids=position_ids, dropout_keys=keys
        )
        x = self.hidden_states(first, context)
        if not self.stage.is_last:
            return (x, labels, *rest)
        return self.lm_head(x, labels, gradient=self.loss_gradient)


class GPTPipeline(PipelineModule):
    """The pipeline of stages, and the loss on the last one.

    Args:
        config: Shape; vocab_size must be set.
        topology: Degrees of the axes.
        stages: One for each pipeline rank, from `pipeline_stages`.
        **stage_arguments: As in `GPTStage`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        topology: ParallelTopology,
        stages: list[PipelineStage],
        **stage_arguments,
    ) -> None:
        self.tied = config.tie_embeddings
        specs = [LayerSpec(GPTStage, config, stage=stage, **stage_arguments) for stage in stages]
        deepspeed.init_distributed(auto_mpi_discovery=False)  # takes the group that exists
        # DeepSpeed 0.19.8 prints seeds, topology and partition.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                layers=specs,
                topology=PipeModelDataParallelTopology(
                    num_pp=topology.pipeline_parallel_size,
                    num_mp=topology.tensor_parallel_size,
                    num_dp=topology.data_parallel_size,
                ),
                loss_fn=self.scaled_loss,
                partition_method="uniform",  # one of our stages each
            )
        self.loss_sum = torch.zeros((), dtype=torch.float64)

    @property
    def stage_model(self) -> GPTStage:
        """This rank's stage."""
        return self.forward_funcs[0]

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of this rank's stage once, by its global name."""
        return self.stage_model.canonical_parameters()

    def scaled_loss(self, losses: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Summed loss of a micro-batch times its scale; the sum itself goes to `loss_sum`.

        Args:
            losses: [b, s] of the last stage.
            scale: What turns the sum into a share of the step's mean.
        """
        loss = losses.sum()
        self.loss_sum = self.loss_sum.to(loss.device) + loss.detach()
        return loss * scale

    def _index_tied_modules(self) -> dict:
        """Ties the embedding of the first stage and the output layer of the last.

        DeepSpeed's own would mark every parameter of a tied module as a copy; here that is the one
        weight, which its gradient norm (`ds_pipe_replicated`) must count once.
        """
        topology = self.topology()
        if not self.tied or topology.get_dim("pipe") == 1:
            return {}
        last = topology.get_dim("pipe") - 1
        tied: dict = {}
        for data in range(topology.get_dim("data")):
            for model in range(topology.get_dim("model")):
                ranks = [topology.get_rank(pipe=p, data=data, model=model) for p in (0, last)]
                group = dist.new_group(ranks)  # by every rank, in the same order
                if self.global_rank in ranks:
                    holder = (
                        self.stage_model.embedding.word
                        if self.stage_model.stage.is_first
                        else self.stage_model.lm_head
                    )
                    weight: Any = holder.weight
                    weight.ds_pipe_replicated = self.stage_model.stage.is_last
                    tied["embedding"] = {
                        "ranks": ranks,
                        "group": group,
                        "weight_attr": ["weight"],
                        "module": holder,
                    }
        return tied

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """The tied weight that this rank holds, and the group over which its gradient is summed."""
        return [(tied["module"].weight, tied["group"]) for tied in self.tied_comms.values()]
