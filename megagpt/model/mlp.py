"""The feed-forward layer: GELU as in GPT-2, or SwiGLU as in Llama, inner width split over tp."""

from __future__ import annotations

import torch
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.kernels.registry import REFERENCE, Kernels
from megagpt.model.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)).

    Source of SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """

    def __init__(
        self, config: ModelConfig, tp: TensorParallel, *, kernels: Kernels = REFERENCE
    ) -> None:
        super().__init__()
        self.tp = tp
        h, f = config.hidden_size, config.ffn_size
        self.up = ColumnParallelLinear(h, f, bias=config.bias, tp=tp)
        self.gate = None
        if config.activation == "swiglu":
            self.gate = ColumnParallelLinear(h, f, bias=config.bias, tp=tp)
        self.activate = kernels.choose(config.activation, size=f // tp.size)
        self.down = RowParallelLinear(f, h, bias=config.bias, tp=tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; s/tp under sequence parallelism."""
        x = self.tp.enter(x)
        if self.gate is None:
            return self.down(self.activate(self.up(x)))
        return self.down(self.activate(self.gate(x), self.up(x)))
