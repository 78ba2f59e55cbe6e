"""The feed-forward layer: GELU as in GPT-2, or SwiGLU as in Llama, inner width split over tp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.model.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    enter_parallel_region,
)
from megagpt.parallel.groups import Group


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)).

    Source of SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self, config: ModelConfig, *, tp_group: Group, sequence_parallel: bool = False
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel = sequence_parallel
        h, f = config.hidden_size, config.ffn_size
        self.up = ColumnParallelLinear(h, f, bias=config.bias, tp_group=tp_group)
        self.gate = None
        if config.activation == "swiglu":
            self.gate = ColumnParallelLinear(h, f, bias=config.bias, tp_group=tp_group)
        self.down = RowParallelLinear(
            f, h, bias=config.bias, tp_group=tp_group, sequence_parallel=sequence_parallel
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; s/tp under sequence parallelism."""
        x = enter_parallel_region(x, self.tp_group, sequence_parallel=self.sequence_parallel)
        if self.gate is None:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.silu(self.gate(x)) * self.up(x))
