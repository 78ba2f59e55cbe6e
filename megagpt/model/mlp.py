"""The feed-forward layer: GELU as in GPT-2, or SwiGLU as in Llama, inner width split over tp."""

from __future__ import annotations

import torch
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.kernels.registry import REFERENCE, Kernels
from megagpt.model.layers import ColumnParallelLinear, RowParallelLinear, TensorParallel
from megagpt.model.recompute import call


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)).

    Source of SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202.

    Args:
        config: Model shape.
        tp: Over which the inner width is split.
        recompute: Whether backward computes the activation again instead of keeping it.
        kernels: Chooses the activation's.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp: TensorParallel,
        *,
        recompute: bool = False,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.recompute = recompute
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
        if not self.recompute:
            return self.down(self.activate(*self._inner(x)))
        # Down takes part, for it is what keeps the activation; recomputation ends before its
        # product and its collective, whose results backward does not need.
        return call(
            lambda *inner: self.down(self.activate(*inner)), *self._inner(x), recompute=True
        )

    def _inner(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.up(x),) if self.gate is None else (self.gate(x), self.up(x))
