"""Which back end each op of each layer takes: chosen once, when the layer is built.

An op is a folder: its `reference.py` is the definition, and each other back end a module that says
by `problem` why it cannot run somewhere. Layers ask by name; `Kernels.table` tells what they got.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Backend = Literal["reference", "triton", "cpu", "cuda"]

BACKENDS: dict[str, tuple[Backend, ...]] = {
    "accumulate": ("cpu",),
    "attention": ("cuda", "cpu"),
    "dropout": ("triton", "cpu"),
    "gelu": ("cpu",),
    "linear_cross_entropy": ("triton", "cpu"),
    "rms_norm": ("triton", "cpu"),
    "swiglu": ("triton", "cpu"),
    "rotary": ("triton", "cpu"),
}
"""Of each op beside its reference, the fastest first; `cuda` is what torch brings for GPUs."""


@dataclass(frozen=True)
class Choice:
    """What a layer got."""

    op: str
    sizes: tuple[tuple[str, int], ...]
    backend: Backend
    reason: str


class Kernels:
    """Chooses for the layers of one model.

    Args:
        requested: `auto` takes the fastest that runs; another name takes that one, wherever the op
            has it.
        device: Of the model's tensors.
        dtype: Of its weights and activations.
    """

    def __init__(
        self,
        requested: Literal["auto"] | Backend = "reference",
        *,
        device: torch.device = torch.device("cpu"),  # noqa: B008, a constant
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.requested = requested
        self.device = device
        self.dtype = dtype
        self.choices: dict[Choice, int] = {}
        if requested != "reference":
            # Here, and not where layers are made: under `zero.Init` tensors are not torch's own,
            # and what a back end imports must not see those.
            for op, backends in BACKENDS.items():
                for backend in backends:
                    _module(op, backend)

    def choose(self, op: str, **sizes: int) -> Callable[..., Any]:
        """The function of one op for one layer.

        Args:
            op: A key of `BACKENDS`.
            **sizes: That the back ends ask for, by the contract's names.

        Raises:
            ValueError: If the requested back end cannot run.
        """
        backend, reason = self._decide(op, sizes)
        choice = Choice(op, tuple(sizes.items()), backend, reason)
        self.choices[choice] = self.choices.get(choice, 0) + 1
        return getattr(_module(op, backend), op)

    def _decide(self, op: str, sizes: dict[str, int]) -> tuple[Backend, str]:
        if self.requested == "reference":
            return "reference", "asked for"
        refused = []
        for backend in BACKENDS[op]:
            asked = {"auto", backend} | ({"triton"} if backend == "cuda" else set())
            if self.requested not in asked:
                continue
            problem = _module(op, backend).problem(self.device, self.dtype, **sizes)
            if problem is None:
                return backend, "fastest here" if self.requested == "auto" else "asked for"
            refused.append(f"{backend}: {problem}")
        if self.requested == "auto":
            return "reference", "; ".join(refused)
        if refused:
            raise ValueError(
                f"training.kernels={self.requested}, but {op} cannot run so: {refused[0]}; "
                "leave training.kernels at auto, which takes what can"
            )
        return "reference", f"there is no {self.requested} of this op"

    def table(self) -> list[str]:
        """A line for each choice: op, sizes, back end, layers that took it, reason."""
        rows = [("op", "sizes", "back end", "layers", "reason")]
        for choice, count in self.choices.items():
            sizes = " ".join(f"{name}={size}" for name, size in choice.sizes)
            rows.append((choice.op, sizes, choice.backend, str(count), choice.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


REFERENCE = Kernels()
"""The definitions, on any device and of any type."""


def _module(op: str, backend: str) -> Any:
    assert backend in get_args(Backend), backend
    return importlib.import_module(f"megagpt.kernels.{op}.{backend}")
