"""What `test_triton_interpreter.py` runs in a process with TRITON_INTERPRET=1.

Every tensor that a kernel reads or makes lies within a larger one full of NaN: what is read beside
it shows in the results, what is written beside it in the band.
"""

import importlib
import itertools
import json
import sys
from pathlib import Path
from unittest import mock

import torch

from megagpt.kernels.linear_cross_entropy.contract import IGNORE_INDEX, Vocabulary
from megagpt.kernels.rms_norm import triton as rms_norm

BAND = 64
# Relative, of whole tensors, against fp64 of the same inputs. fp32: logits of 15 are 1e-6 off, and
# so is each softmax. bf16: the interpreter cuts off what does not fit, up to 2^-8 of each element.
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.2e-2}
OPS = ("dropout", "swiglu", "rotary", "rms_norm", "linear_cross_entropy")
_SHAPES = {
    "dropout": [{"b": 2, "s": 3, "h": 5}, {"b": 1, "s": 2, "h": 1025}],
    "swiglu": [{"size": 1}, {"size": 77}, {"size": 5000}],
    "rotary": [
        {"b": 1, "s": 1, "n": 1, "k": 1, "d": 2}, {"b": 2, "s": 3, "n": 6, "k": 2, "d": 10},
        {"b": 1, "s": 2, "n": 8, "k": 8, "d": 128},
    ],
    "rms_norm": [
        {"rows": r, "size": h, "residual": x}
        for (r, h), x in itertools.product([(1, 1), (3, 7), (19, 16), (2, 4097)], (0, 1))
    ],
    "linear_cross_entropy": [
        {"t": t, "v": v, "real": real, "way": way}
        for (t, v, real), way in itertools.product(
            [(1, 1, 1), (9, 130, 130), (6, 5000, 4999)], ("told", "told wrong", "of each")
        )
    ],
}  # fmt: skip
CASES = [
    {"op": op, "dtype": dtype, **shape}
    for op in OPS
    for shape in _SHAPES[op]
    for dtype in TOLERANCE
]


def name_of(case):
    """One word a setting."""
    return "-".join(map(str, case.values()))


class Guarded:
    """Puts tensors between bands of NaN, and looks at the bands afterwards."""

    def __init__(self):
        self._wholes = []

    def __call__(self, tensor):
        if not tensor.is_floating_point():
            return tensor
        whole = torch.full((tensor.numel() + 2 * BAND,), torch.nan, dtype=tensor.dtype)
        inner = whole[BAND : BAND + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        self._wholes.append(whole)
        return inner

    def empty(self, *size, dtype=None, device=None):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        return self(torch.full(shape, torch.nan, dtype=dtype or torch.float32))

    def empty_like(self, tensor):
        return self(torch.full_like(tensor, torch.nan))

    def are_intact(self):
        return all(bool(band.isnan().all()) for w in self._wholes for band in (w[:BAND], w[-BAND:]))


def inputs_of(case, generator):
    """Arguments of the op and keywords; those of fp types have a gradient, but rotary's tables."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    op = case["op"]
    if op == "dropout":
        stream = torch.randint(-(2**63), 2**63 - 1, (case["b"],), generator=generator)
        x = normal(case["b"], case["s"], case["h"])
        return [x, stream], {"first": 2**33 + 5, "probability": 0.25}
    if op == "swiglu":
        return [3 * normal(case["size"]), normal(case["size"])], {}
    if op == "rotary":
        b, s, d = case["b"], case["s"], case["d"]
        angles = 3 * normal(1, s, d // 2)
        heads = [normal(b, s, case[x], d) for x in "nk"]
        return [*heads, angles.cos(), angles.sin()], {}
    if op == "rms_norm":
        x, residual = normal(2, case["rows"], case["size"])
        weight = normal(case["size"])
        return [x, weight, 1e-5, *([residual] if case["residual"] else [])], {}
    t, h = case["t"], 6
    targets = torch.randint(case["real"], (t,), generator=generator)
    if t > 1:
        targets[::4] = IGNORE_INDEX
    keywords = {"vocabulary": Vocabulary(case["real"]), "z_loss": 1e-2, "gradient": 0.25}
    return [normal(t, h), normal(case["v"], h), targets], keywords


def upstream_of(case, out, generator):
    """What comes to an output in backward."""
    if case["op"] != "linear_cross_entropy" or case["way"] == "of each":
        return torch.randn(out.shape, generator=generator, dtype=torch.float64)
    value = 0.25 if case["way"] == "told" else 0.75
    return torch.tensor(value, dtype=torch.float64).expand(out.shape)


def outcome(case, backend, dtype, guard=lambda tensor: tensor):
    """Outputs and gradients, in fp64."""
    generator = torch.Generator().manual_seed(1)
    arguments, keywords = inputs_of(case, generator)
    rounded = getattr(torch, case["dtype"])
    is_table = {2, 3} if case["op"] == "rotary" else set()
    own = []
    for place, x in enumerate(arguments):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = guard(x.to(rounded).to(dtype)).requires_grad_(place not in is_table)
        own.append(x)
    function = importlib.import_module(f"megagpt.kernels.{case['op']}.{backend}")
    out = getattr(function, case["op"])(*own, **keywords)
    out = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    if case["op"] == "rms_norm" and not case["residual"]:
        out = out[:1]  # the sum is the input itself
    coming = [upstream_of(case, x, generator) for x in out]
    if isinstance(coming[0], torch.Tensor) and case["op"] != "linear_cross_entropy":
        coming = [guard(x.to(rounded).to(y.dtype)) for x, y in zip(coming, out, strict=True)]
    else:
        # An expanded number stays one: it is what `.sum().backward()` hands in.
        coming = [x.to(y.dtype) if case.get("way") == "of each" else
                  x[(0,) * x.dim()].to(y.dtype).expand(y.shape)
                  for x, y in zip(coming, out, strict=True)]  # fmt: skip
    torch.autograd.backward(out, coming)
    gradients = [x.grad for x in own if isinstance(x, torch.Tensor) and x.requires_grad]
    return [x.detach().double() for x in (*out, *gradients)]


def check(case):
    """Relative errors, and whether the bands are intact."""
    rms_norm._PROGRAMS = 4  # so that a few rows make runs of several
    exact = outcome(case, "reference", torch.float64)
    guard = Guarded()
    with (
        mock.patch.object(torch, "empty", guard.empty),
        mock.patch.object(torch, "empty_like", guard.empty_like),
    ):
        ours = outcome(case, "triton", getattr(torch, case["dtype"]), guard)
    errors = [
        ((mine - truth).norm() / truth.norm().clamp(min=1e-2)).item()
        for mine, truth in zip(ours, exact, strict=True)
    ]
    # NaN is no number that is less than another.
    return {"errors": [e if e == e else 1e9 for e in errors], "guards": guard.are_intact()}


def any_shape(op):
    """A property: the same for shapes that hypothesis draws."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    count = st.integers(1, 40)
    shapes = {
        "dropout": {"b": st.integers(1, 3), "s": st.integers(1, 5), "h": count},
        "swiglu": {"size": st.integers(1, 3000)},
        "rotary": {
            "b": st.integers(1, 2), "s": st.integers(1, 4), "n": st.integers(1, 5),
            "k": st.integers(1, 3), "d": st.integers(1, 20).map(lambda half: 2 * half),
        },
        "rms_norm": {
            "rows": st.integers(1, 12), "size": st.integers(1, 600), "residual": st.integers(0, 1),
        },
        "linear_cross_entropy": {
            "t": st.integers(1, 12), "v": st.integers(1, 300), "real": st.just(1),
            "way": st.sampled_from(["told", "told wrong", "of each"]),
        },
    }[op]  # fmt: skip
    fixed = {"op": st.just(op), "dtype": st.sampled_from([*TOLERANCE])}
    draw = st.fixed_dictionaries({**fixed, **shapes})

    @settings(max_examples=15, deadline=None, database=None)
    @given(draw, st.integers(1, 300))
    def holds(case, real):
        if op == "linear_cross_entropy":
            case = {**case, "real": min(real, case["v"])}
        found = check(case)
        # A softmax over one token has no gradient: what is left is rounding.
        assert max(found["errors"]) < 2 * TOLERANCE[case["dtype"]], (case, found)
        assert found["guards"], case

    holds()
    return "ok"


def split(rank, size):
    """Errors of loss and gradients of a vocabulary split over ranks; rank 0's are told."""
    import torch.distributed as dist

    from megagpt.kernels.linear_cross_entropy import reference, triton

    generator = torch.Generator().manual_seed(1)
    t, h, v, real = 9, 6, 48, 37  # with 4 ranks, the last one holds padding only
    hidden, weight = (torch.randn(*x, generator=generator) for x in ((t, h), (v, h)))
    targets = torch.randint(real, (t,), generator=generator)
    targets[2] = IGNORE_INDEX
    whole = [x.double().requires_grad_() for x in (hidden, weight)]
    exact = reference.linear_cross_entropy(
        *whole, targets, vocabulary=Vocabulary(real), z_loss=1e-2
    )
    exact.sum().backward()
    rows = v // size
    group = dist.new_group(list(range(size)))
    own = [hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()]
    loss = triton.linear_cross_entropy(
        *own, targets, vocabulary=Vocabulary(real, rank * rows, group), z_loss=1e-2
    )
    loss.sum().backward()
    of_hidden = own[0].grad
    dist.all_reduce(of_hidden)
    truth = (exact, whole[0].grad, whole[1].grad.chunk(size)[rank])
    return [
        ((mine.double() - x).norm() / x.norm().clamp(min=1e-2)).item()
        for mine, x in zip((loss.detach(), of_hidden, own[1].grad), truth, strict=True)
    ]


def main(path):
    """Writes what was found."""
    from megagpt.testing.distributed import run_distributed

    found = {name_of(case): check(case) for case in CASES}
    found |= {f"{op} of any shape": any_shape(op) for op in OPS}
    for size in (2, 4):
        found[f"tp {size}"] = [max(x) for x in zip(*run_distributed(split, size), strict=True)]
    Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
