"""Today's memory of one micro-batch, term by term, and what will lower it.

`python tests/fake_cuda/terms.py` writes the table into docs/gpu.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from live_bytes import KINDS, Job

from megagpt.config.schema import ModelConfig
from megagpt.testing.report import markdown_table, replace_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
COLUMNS = (*KINDS, "peak")
WORKS = {
    18: "gathered inputs of sequence parallelism, kept",
}
"""What a number in the table stands for."""

_8B = ModelConfig(
    num_layers=2,
    hidden_size=4096,
    num_attention_heads=32,
    num_kv_heads=8,
    ffn_hidden_size=14336,
    seq_length=8192,
    vocab_size=128256,
    normalization="rmsnorm",
    position_embedding="rope",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
_70B = replace(_8B, hidden_size=8192, num_attention_heads=64, ffn_hidden_size=28672)
_GPT2 = replace(
    ModelConfig(num_layers=2, hidden_size=4096, num_attention_heads=32),
    seq_length=_8B.seq_length,
    vocab_size=_8B.vocab_size,
)
_SPLIT = Job(_70B, tensor_parallel_size=8, sequence_parallel=True)


@dataclass(frozen=True)
class Row:
    """A job, with its MiB in the order of `COLUMNS` and what will lower a column."""

    name: str
    job: Job
    mib: tuple[int, ...]
    lowered_by: Mapping[str, int] = field(default_factory=dict)


# A layer of the 8B shape keeps, in units of 64 MiB ([8192, 4096] of bf16): its input, both norms'
# outputs and the sum between (4), query and attended (2), key and value (0.5), and of the MLP gate,
# up and product (3 x 3.5), 17 in all, and 1 MiB of attention's sums: 1,089. The loss: the output
# weight's gradient in fp32 and in bf16 (3,006), hidden states' (64) and a chunk of logits (250).
ROWS = (
    Row("8B", Job(_8B), (2836, 2836, 130, 1089, 3321, 736, 8465)),
    Row(
        "8B, document mask",
        Job(_8B, masked=True),
        (2836, 2836, 130, 1089, 3321, 736, 8465),
    ),
    Row(
        "8B without grouped queries, document mask",
        Job(replace(_8B, num_kv_heads=None), masked=True),
        (2932, 2932, 130, 1185, 3321, 736, 8753),
    ),
    Row(
        "8B, dropout 0.1",
        Job(replace(_8B, dropout=0.1)),
        (2836, 2836, 130, 1089, 3321, 736, 8465),
    ),
    Row(
        "8B, `selective`",
        Job(_8B, recompute="selective"),
        (2836, 2836, 130, 865, 3321, 736, 8017),
    ),
    Row("8B, `full`", Job(_8B, recompute="full"), (2836, 2836, 130, 64, 3321, 1537, 6415)),
    Row(
        "8B, fp32",
        Job(_8B, torch.float32),
        (5672, 5672, 260, 2369, 2633, 1472, 15308),
    ),
    Row(
        "8B, fp32, evaluation",
        Job(_8B, torch.float32, backward=False),
        (5672, 0, 0, 0, 501, 1988, 7660),
    ),
    Row("GPT-2 style, width 4096", Job(_GPT2), (1834, 1834, 128, 1025, 3321, 1066, 7333)),
    Row("70B", Job(_70B), (7272, 7272, 258, 2146, 6391, 1472, 18213)),
    Row(
        "70B, tp 8",
        replace(_SPLIT, sequence_parallel=False),
        (912, 912, 258, 716, 916, 528, 3519),
    ),
    Row(
        "70B, tp 8, sequence parallel",
        _SPLIT,
        (912, 912, 18, 492, 1044, 416, 2974),
        {"layers": 18},
    ),
    Row(
        "70B, tp 8, sequence parallel, document mask",
        replace(_SPLIT, masked=True),
        (912, 912, 18, 492, 1044, 416, 2974),
    ),
)


def table() -> str:
    """The rows as the page shows them."""

    def cell(row: Row, kind: str, mib: int) -> str:
        number = row.lowered_by.get(kind)
        return f"{mib:,}" + (f" ({number})" if number else "")

    rows = [
        [row.name, *(cell(row, kind, mib) for kind, mib in zip(COLUMNS, row.mib, strict=True))]
        for row in ROWS
    ]
    numbers = "; ".join(f"({number}) {work}" for number, work in WORKS.items())
    return f"{markdown_table(['MiB', *COLUMNS], rows)}\n\nTo be lowered: {numbers}."


if __name__ == "__main__":
    replace_table(PAGE, "memory", table())
