"""The grid: every supported layout, with the style, precision and features it is proved in.

All cells train the same data with the same settings (`suite.py`), so a cell is compared with the
oracle's curve of its style and features.
"""

from dataclasses import dataclass

from megagpt.config.layout import Layout

GPT2, LLAMA = "gpt2", "llama"
STYLES = {
    # LayerNorm, learned positions, GELU, biases, tied embedding
    GPT2: "",
    # RMSNorm, rotary, SwiGLU, two key/value heads for four query heads, QK-norm, untied
    LLAMA: "--model.normalization rmsnorm --model.position_embedding rope --model.qk_norm true "
    "--model.activation swiglu --model.bias false --model.num_kv_heads 2 "
    "--model.tie_embeddings false",
}
FEATURES = {
    "documents": "--data.document_masking true",
    "dropout": "--model.dropout 0.1",
    # DeepSpeed swaps to NVMe what has at least 1 MiB on a rank, and keeps the rest in memory.
    "wide": "--model.hidden_size 128 --model.ffn_hidden_size 8192 --model.num_layers 2 "
    "--model.seq_length 16",
}


@dataclass(frozen=True)
class Cell:
    """One proof."""

    layout: str
    style: str = GPT2
    precision: str = "fp32"
    features: tuple[str, ...] = ()
    is_core: bool = False
    """Whether `make test` runs it; the others are slow."""

    @property
    def name(self) -> str:
        return " ".join([self.layout, self.style, self.precision, *self.features])

    @property
    def reference(self) -> tuple:
        """Which of the oracle's curves it must give."""
        return self.style, self.features

    @property
    def world_size(self) -> int:
        return Layout.parse(self.layout).world_size

    def arguments(self) -> list[str]:
        """Flags that differ between cells."""
        return [
            *STYLES[self.style].split(),
            *(word for feature in self.features for word in FEATURES[feature].split()),
            *("--training.precision", self.precision),
            *Layout.parse(self.layout).arguments(),
        ]


def _core(layout, *arguments, **options):
    return Cell(layout, *arguments, is_core=True, **options)


WIDE = ("wide",)
DOCUMENTS, DROPOUT, BOTH = ("documents",), ("dropout",), ("documents", "dropout")

CELLS = (
    # one rank
    Cell("zero0"),
    Cell("zero1", LLAMA),
    Cell("zero3", GPT2),
    Cell("zero0-full", GPT2, features=BOTH),
    Cell("zero1-selective", LLAMA, features=BOTH),
    Cell("zero1", GPT2, "bf16"),
    Cell("zero2", LLAMA, features=DOCUMENTS),
    Cell("zero3-full", LLAMA, features=BOTH),
    Cell("zero1-offload_optimizer_cpu", LLAMA),
    Cell("zero2-offload_optimizer_cpu", GPT2, "bf16"),
    Cell("zero3-offload_cpu", GPT2),
    Cell("zero2", LLAMA, "bf16", features=DOCUMENTS),
    Cell("zero3", LLAMA, "bf16"),
    # data parallelism and ZeRO
    Cell("dp2-zero0", LLAMA),
    Cell("dp2-zero1", GPT2, features=DROPOUT),
    Cell("dp2-zero2", LLAMA, features=DOCUMENTS),
    _core("dp2-zero3", GPT2),
    Cell("dp2-zero3-full", LLAMA, features=BOTH),
    Cell("dp2-zero3-selective", GPT2),
    Cell("dp4-zero1", LLAMA, features=DROPOUT),
    Cell("dp4-zero2", GPT2),
    Cell("dp4-zero3", LLAMA),
    Cell("dp2-zero1", LLAMA, "bf16"),
    Cell("dp2-zero2", GPT2, "bf16"),
    Cell("dp2-zero3", LLAMA, "bf16"),
    # tensor parallelism
    _core("tp2-zero0", GPT2),
    Cell("tp2-zero0", LLAMA, features=DOCUMENTS),
    Cell("tp2-zero1", LLAMA),
    Cell("tp2-zero3", GPT2),
    Cell("tp4-zero0", GPT2),
    Cell("tp4-zero0", LLAMA),  # two ranks share each key/value head
    Cell("tp4-zero3", LLAMA),
    Cell("tp2-zero1", GPT2, "bf16"),
    # sequence parallelism
    Cell("tp2-sp-zero0", GPT2),
    _core("tp2-sp-zero1", LLAMA, features=BOTH),
    Cell("tp2-sp-zero1-full", GPT2, features=DROPOUT),
    Cell("tp4-sp-zero0", LLAMA, features=DOCUMENTS),
    Cell("tp4-sp-zero1", GPT2, features=DROPOUT),
    Cell("tp2-sp-zero1", LLAMA, "bf16"),
    # pipeline
    _core("pp2-zero0", GPT2),
    Cell("pp2-zero0", LLAMA, features=DOCUMENTS),
    Cell("pp2-zero1", GPT2, features=BOTH),
    Cell("pp2-zero1", LLAMA),
    Cell("pp2-zero1-full", GPT2),
    Cell("pp2-zero1-selective-flops", LLAMA),
    Cell("pp4-zero0", GPT2, features=DOCUMENTS),
    Cell("pp4-zero1", LLAMA, features=DROPOUT),
    Cell("pp2-zero1", GPT2, "bf16"),
    Cell("pp4-zero1", LLAMA, "bf16"),
    # three axes
    Cell("tp2-pp2-zero0", GPT2),
    _core("tp2-pp2-zero1", LLAMA, features=DOCUMENTS),
    Cell("tp2-sp-pp2-zero0", LLAMA, features=DROPOUT),
    _core("tp2-sp-pp2-zero1", GPT2, features=BOTH),
    Cell("tp2-dp2-zero0", LLAMA),
    Cell("tp2-dp2-zero1", GPT2),
    Cell("tp2-dp2-zero2", LLAMA, features=DOCUMENTS),
    _core("tp2-dp2-zero3", GPT2),
    Cell("tp2-sp-dp2-zero1", GPT2, features=BOTH),
    Cell("tp2-sp-dp2-zero2", GPT2),
    Cell("tp2-sp-dp2-zero3", LLAMA, features=BOTH),
    Cell("tp2-sp-dp2-zero3-full", GPT2),
    Cell("pp2-dp2-zero0", GPT2),
    _core("pp2-dp2-zero1", GPT2, features=DOCUMENTS),
    Cell("pp2-dp2-zero1", LLAMA, features=BOTH),
    Cell("tp2-sp-pp2-zero1", LLAMA, "bf16"),
    Cell("tp2-dp2-zero2", GPT2, "bf16"),
    Cell("tp2-sp-dp2-zero3", LLAMA, "bf16"),
    Cell("pp2-dp2-zero1", GPT2, "bf16"),
    # offload
    Cell("dp2-zero1-offload_optimizer_cpu", GPT2),
    Cell("dp2-zero2-offload_optimizer_cpu", LLAMA),
    _core("dp2-zero3-offload_cpu", LLAMA),
    Cell("dp2-zero3-offload_optimizer_cpu", GPT2),
    Cell("dp2-zero3-offload_optimizer_nvme", LLAMA, features=WIDE),
    Cell("dp2-zero3-offload_nvme", GPT2, features=WIDE),
    Cell("tp2-dp2-zero3-offload_cpu", LLAMA),
    Cell("tp2-dp2-zero2-offload_optimizer_cpu", GPT2),
    Cell("pp2-zero1-offload_optimizer_cpu", GPT2),
    Cell("pp2-zero1-offload_optimizer_cpu", GPT2, "bf16"),
    Cell("pp2-dp2-zero1-offload_optimizer_cpu", GPT2, "bf16"),
    Cell("dp2-zero2-offload_optimizer_cpu", GPT2, "bf16"),
    Cell("dp2-zero3-offload_nvme", GPT2, "bf16", features=WIDE),
)

GPU_CELLS = (
    # No CPU path of DeepSpeed's trains in fp16.
    Cell("zero1", GPT2, "fp16"),
    Cell("zero2", LLAMA, "fp16", features=DOCUMENTS),
    Cell("zero3", LLAMA, "fp16"),
)
"""Those that no CPU can train, run by `make gpu-test` beside the others."""
