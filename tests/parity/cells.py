"""The grid: every supported layout, with the style, precision and features it is proved in.

All cells train the same data with the same settings (`suite.py`), so a cell is compared with the
oracle's curve of its style and features.
"""

from dataclasses import dataclass
from typing import Any

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

_SMALL = 1_000
KEYS: dict[str, dict[str, Any]] = {
    # The secondary copy of ZeRO++ on two ranks: of all at dp 2, of each pair at dp 4.
    "hpz": {"zero_optimization": {"zero_hpz_partition_size": 2}},
    # Many buckets, where by default one holds all.
    "buckets": {
        "zero_optimization": {
            "contiguous_gradients": False,
            "reduce_bucket_size": _SMALL,
            "allgather_bucket_size": _SMALL,
            "allgather_partitions": False,
            "use_multi_rank_bucket_allreduce": False,
            "round_robin_gradients": True,
        }
    },
    "reduce": {
        "zero_optimization": {
            "reduce_scatter": False,
            "overlap_comm": True,
            "ignore_unused_parameters": False,
            "load_from_fp32_weights": False,
        },
        "zero_allow_untested_optimizer": True,
        "disable_python_gc": True,
    },
    "predivide": {"gradient_predivide_factor": 2.0, "zero_optimization": {"reduce_scatter": False}},
    "prescale": {"prescale_gradients": True, "zero_optimization": {"reduce_scatter": False}},
    "fetch": {
        "zero_optimization": {
            "overlap_comm": True,
            "contiguous_gradients": False,
            "reduce_bucket_size": _SMALL,
            "sub_group_size": _SMALL,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "stage3_model_persistence_threshold": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
    },
    "gather": {
        "zero_optimization": {
            "reduce_scatter": False,
            "stage3_use_all_reduce_for_fetch_params": True,
            "stage3_prefetch_bucket_size": _SMALL,
            "stage3_max_live_parameters": 10 * _SMALL,
        }
    },
    "sequential": {
        "zero_optimization": {
            "stage3_allgather_sequential": True,
            "memory_efficient_linear": False,
            "override_module_apply": False,
            "enable_sanity_checks": True,
            "log_trace_cache_warnings": True,
            "parameter_alignment": False,
        }
    },
    "immediate": {"bf16": {"immediate_grad_update": True, "check_grad_overflow": False}},
    "reduced": {"communication_data_type": "bf16"},
    "scaler": {
        "fp16": {"initial_scale_power": 10, "loss_scale_window": 5, "hysteresis": 1}
        | {"consecutive_hysteresis": True, "min_loss_scale": 2, "auto_cast": False}
    },
    "fixed": {"fp16": {"loss_scale": 1024}},
    "pinned": {
        "zero_optimization": {
            "offload_param": {"pin_memory": False},
            "offload_optimizer": {"pin_memory": False, "cpuadam_cores_perc": 0.5},
        },
        "zero_force_ds_cpu_optimizer": False,
    },
    "swapping": {
        "zero_optimization": {
            "offload_param": {"buffer_count": 6, "buffer_size": 4_000_000, "pin_memory": False},
            "offload_optimizer": {"buffer_count": 5, "fast_init": True}
            | {"pipeline_read": True, "pipeline_write": True},
        },
        "aio": {"block_size": 65_536, "queue_depth": 4, "intra_op_parallelism": 2}
        | {"single_submit": True, "overlap_events": False, "use_gds": False},
    },
    "watched": {
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "dump_state": True,
        "log_level": "warning",
        "timers": {"throughput": {"enabled": True, "synchronized": True}},
        "comms_logger": {"enabled": True, "prof_all": True, "prof_ops": [], "verbose": False}
        | {"debug": False},
        "flops_profiler": {"enabled": True, "recompute_fwd_factor": 0.0, "profile_step": 2}
        | {"module_depth": -1, "top_modules": 1, "detailed": False, "output_file": "/dev/null"},
    },
}
"""Keys of the DeepSpeed JSON at other values than their own: the computation must not change."""


def _merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A JSON with another's keys put in."""
    merged = dict(values)
    for key, value in more.items():
        is_section = isinstance(value, dict)
        merged[key] = _merged(merged.get(key, {}), value) if is_section else value
    return merged


@dataclass(frozen=True)
class Cell:
    """One proof."""

    layout: str
    style: str = GPT2
    precision: str = "fp32"
    features: tuple[str, ...] = ()
    """Names out of FEATURES, and out of KEYS."""
    is_core: bool = False
    """Whether `make test` runs it; the others are slow."""

    @property
    def name(self) -> str:
        return " ".join([self.layout, self.style, self.precision, *self.features])

    @property
    def reference(self) -> tuple:
        """Which of the oracle's curves it must give."""
        return self.style, tuple(name for name in self.features if name in FEATURES)

    @property
    def world_size(self) -> int:
        return Layout.parse(self.layout).world_size

    def arguments(self) -> list[str]:
        """Flags that differ between cells."""
        return [
            *STYLES[self.style].split(),
            *(word for name in self.features for word in FEATURES.get(name, "").split()),
            *("--training.precision", self.precision),
            *Layout.parse(self.layout).arguments(),
        ]

    def ds_config(self) -> dict[str, Any]:
        """The DeepSpeed JSON."""
        values = Layout.parse(self.layout).ds_config()
        for name in self.features:
            values = _merged(values, KEYS.get(name, {}))
        return values


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
    # keys of the DeepSpeed JSON
    Cell("dp2-zero3", LLAMA, features=("hpz",)),
    Cell("dp4-zero3", GPT2, features=("hpz",)),
    Cell("dp2-zero3", GPT2, "bf16", features=("hpz",)),
    Cell("dp2-zero1", LLAMA, features=("buckets",)),
    Cell("dp2-zero2", GPT2, features=("buckets",)),
    Cell("dp2-zero1", GPT2, features=("reduce",)),
    Cell("dp2-zero2", LLAMA, features=("reduce",)),
    Cell("dp2-zero0", LLAMA, features=("predivide",)),
    Cell("dp2-zero2", GPT2, features=("predivide",)),
    Cell("dp2-zero0", GPT2, features=("prescale",)),
    Cell("dp2-zero2", LLAMA, features=("prescale",)),
    Cell("dp2-zero3", LLAMA, features=("prescale",)),
    Cell("dp2-zero3", GPT2, features=("fetch",)),
    Cell("dp2-zero3", LLAMA, features=("gather",)),
    Cell("dp2-zero3", GPT2, features=("sequential",)),
    Cell("dp2-zero1", LLAMA, "bf16", features=("immediate",)),
    Cell("dp2-zero2", GPT2, "bf16", features=("reduced",)),
    Cell("dp2-zero3", LLAMA, "bf16", features=("reduced",)),
    Cell("dp2-zero3-offload_cpu", GPT2, features=("pinned",)),
    Cell("dp2-zero3-offload_nvme", GPT2, features=("wide", "swapping")),
    Cell("dp2-zero1", GPT2, features=("watched",)),
)

GPU_CELLS = (
    # No CPU path of DeepSpeed's trains in fp16.
    Cell("zero1", GPT2, "fp16"),
    Cell("zero2", LLAMA, "fp16", features=DOCUMENTS),
    Cell("zero3", LLAMA, "fp16"),
    Cell("zero1", LLAMA, "fp16", features=("scaler",)),
    Cell("zero2", GPT2, "fp16", features=("fixed",)),
)
"""Those that no CPU can train, run by `make gpu-test` beside the others."""
