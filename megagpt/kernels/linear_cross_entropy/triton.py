"""Linear + cross entropy on a GPU: Triton's row passes between torch's matrix products."""

# c tokens of a chunk, v padded vocabulary; "/tp" local

from __future__ import annotations

import torch

from megagpt.kernels.linear_cross_entropy.chunked import ChunkedLinearCrossEntropy
from megagpt.kernels.triton_support import triton_problem


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return triton_problem(device, dtype)


@torch.library.custom_op("megagpt::row_statistics", mutates_args=())
def _statistics(logits: torch.Tensor, index: torch.Tensor, num_real: int) -> torch.Tensor:
    from megagpt.kernels.linear_cross_entropy import triton_kernels as kernels

    rows, columns = logits.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    kernels.statistics[(rows,)](
        logits, index, out, rows, columns, num_real, BLOCK=kernels.BLOCK, num_warps=8
    )
    return out


@torch.library.custom_op("megagpt::row_gradients", mutates_args=("logits",))
def _gradients(
    logits: torch.Tensor,
    index: torch.Tensor,
    log_sum_exp: torch.Tensor,
    scale: torch.Tensor,
    target_scale: torch.Tensor,
    num_real: int,
) -> None:
    from megagpt.kernels.linear_cross_entropy import triton_kernels as kernels

    rows, columns = logits.shape
    kernels.gradients[(rows,)](
        *(logits, index, log_sum_exp, scale, target_scale, columns, num_real),
        BLOCK=kernels.BLOCK,
        num_warps=8,
    )


@torch.library.custom_op("megagpt::scale_unless_one", mutates_args=("tensor",))
def _scale_unless_one(tensor: torch.Tensor, ratio: torch.Tensor, tolerance: float) -> None:
    from megagpt.kernels.linear_cross_entropy import triton_kernels as kernels

    block = kernels.SCALED_BLOCK
    grid = (-(-tensor.numel() // block),)
    kernels.scale_unless_one[grid](tensor, ratio, tolerance, tensor.numel(), BLOCK=block)


@_statistics.register_fake
def _(logits, index, num_real):
    return torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)


@_gradients.register_fake
def _(logits, index, log_sum_exp, scale, target_scale, num_real):
    return None


@_scale_unless_one.register_fake
def _(tensor, ratio, tolerance):
    return None


class _Rows:
    """See `contract.RowPasses`."""

    def statistics(self, logits: torch.Tensor, index: torch.Tensor, num_real: int) -> torch.Tensor:
        return _statistics(logits, index, num_real)

    def gradients_(
        self,
        logits: torch.Tensor,
        index: torch.Tensor,
        log_sum_exp: torch.Tensor,
        scale: torch.Tensor,
        target_scale: torch.Tensor,
        num_real: int,
    ) -> None:
        _gradients(logits, index, log_sum_exp, scale, target_scale, num_real)

    def accumulate_(self, total: torch.Tensor, part: torch.Tensor) -> None:
        total.add_(part)  # torch's kernel converts as it reads

    def scale_unless_one_(
        self, tensors: tuple[torch.Tensor, ...], ratio: torch.Tensor, tolerance: float
    ) -> None:
        for tensor in tensors:
            if tensor.numel():
                _scale_unless_one(tensor, ratio, tolerance)


linear_cross_entropy = ChunkedLinearCrossEntropy(_Rows())
"""See `contract.LinearCrossEntropy`."""
