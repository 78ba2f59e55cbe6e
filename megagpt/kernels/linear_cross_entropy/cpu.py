"""Linear + cross entropy on a CPU: each row of logits stays in the cache through a pass."""

# c tokens of a chunk, v padded vocabulary; "/tp" local

from __future__ import annotations

import torch

from megagpt.kernels.accumulate.cpu import accumulate
from megagpt.kernels.linear_cross_entropy.chunked import ChunkedLinearCrossEntropy
from megagpt.kernels.native import POINTER, SIZE, Library, at

_LIBRARY = Library(
    __file__,
    {
        "row_statistics": [POINTER, POINTER, SIZE, SIZE, SIZE, POINTER],
        "row_gradients": [POINTER] * 5 + [SIZE] * 3,
    },
)


def problem(device: torch.device, dtype: torch.dtype, **_: int) -> str | None:
    """Why it cannot run on tensors like these; None if it can."""
    return _LIBRARY.problem(device, dtype)


class _Rows:
    """See `contract.RowPasses`."""

    def statistics(self, logits: torch.Tensor, index: torch.Tensor, num_real: int) -> torch.Tensor:
        out = torch.empty(3, logits.shape[0], dtype=torch.float32)
        _LIBRARY.call(
            "row_statistics", logits.dtype, at(logits), at(index), *logits.shape, num_real, at(out)
        )
        return out

    def gradients_(
        self,
        logits: torch.Tensor,
        index: torch.Tensor,
        log_sum_exp: torch.Tensor,
        scale: torch.Tensor,
        target_scale: torch.Tensor,
        num_real: int,
    ) -> None:
        _LIBRARY.call(
            "row_gradients",
            logits.dtype,
            *map(at, (logits, index, log_sum_exp, scale, target_scale)),
            *logits.shape,
            num_real,
        )

    def accumulate_(self, total: torch.Tensor, part: torch.Tensor) -> None:
        accumulate(total, part)

    def scale_unless_one_(
        self, tensors: tuple[torch.Tensor, ...], ratio: torch.Tensor, tolerance: float
    ) -> None:
        if not abs(ratio.item() - 1.0) <= tolerance:  # NaN too
            for tensor in tensors:
                tensor.mul_(ratio)


linear_cross_entropy = ChunkedLinearCrossEntropy(_Rows())
"""See `contract.LinearCrossEntropy`."""
