"""LayerNorm and RMSNorm over the last dim, replicated over tensor-parallel ranks.

`split_group` is for norms whose input is split over that group (per-head norms; all norms of the
residual stream under sequence parallelism): each rank then sees a part of the weight's gradient,
and the parts are summed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megagpt.config.schema import ModelConfig
from megagpt.kernels.registry import REFERENCE, Kernels
from megagpt.parallel.collectives import copy_to_group
from megagpt.parallel.groups import Group


class Norm(nn.Module):
    """The norm that the configuration names; a bias only in LayerNorm, where the model has biases.

    Sources: LayerNorm, Ba et al. 2016, https://arxiv.org/abs/1607.06450; RMSNorm, Zhang and
    Sennrich 2019, https://arxiv.org/abs/1910.07467, normalised in float32.
    """

    def __init__(
        self,
        config: ModelConfig,
        size: int,
        *,
        split_group: Group = None,
        kernels: Kernels = REFERENCE,
    ) -> None:
        super().__init__()
        self.split_group = split_group
        self.eps = config.norm_eps
        self.rms_norm = None
        if config.normalization == "rmsnorm":
            self.rms_norm = kernels.choose("rms_norm", size=size)
        self.weight = nn.Parameter(torch.empty(size))
        has_bias = config.bias and self.rms_norm is None
        self.bias = nn.Parameter(torch.empty(size)) if has_bias else None

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[.., size], and what is added to it first -> the norm of the sum, and the sum."""
        weight = copy_to_group(self.weight, self.split_group)
        if self.rms_norm is not None:
            return self.rms_norm(x, weight, self.eps, residual)
        total = x if residual is None else x + residual
        bias = None if self.bias is None else copy_to_group(self.bias, self.split_group)
        return F.layer_norm(total, total.shape[-1:], weight, bias, self.eps), total
