"""The table of layouts and settings that are refused or warned of, with reason and remedy.

Checked before any process group exists; docs/layouts.md is made from it. Pure: no torch, no
DeepSpeed. Caller: `deepspeed_config.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from megagpt.config.deepspeed_keys import AUTO, STAGE3_KEYS
from megagpt.config.schema import Config

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Facts:
    """What the rules look at."""

    config: Config
    """The typed configuration."""
    ds_config: dict[str, Any]
    """The DeepSpeed JSON, filled in."""
    world_size: int
    """Ranks."""
    device: Device
    """What the run trains on."""

    @property
    def tp(self) -> int:
        """tensor_parallel_size."""
        return self.config.parallel.tensor_parallel_size

    @property
    def pp(self) -> int:
        """pipeline_parallel_size."""
        return self.config.parallel.pipeline_parallel_size

    @property
    def zero(self) -> dict[str, Any]:
        """The section zero_optimization."""
        return self.ds_config.get("zero_optimization", {})

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; None where what is stated is none, a fault that is reported already."""
        stage = self.zero.get("stage")
        return None if stage == AUTO else stage

    def offload(self, what: Literal["optimizer", "param"]) -> str:
        """Device of an offload section, `none` without one."""
        return self.zero.get(f"offload_{what}", {}).get("device", "none")


@dataclass(frozen=True)
class Rule:
    """One combination that does not work."""

    combination: str
    """In words, for the docs."""
    reason: str
    """Why."""
    remedy: str
    """What to change."""
    find: Callable[[Facts], str | None]
    """The offending values, or None where the rule is kept."""
    is_warning: bool = False
    """Whether the run goes on."""

    def message(self, facts: Facts) -> str | None:
        """One clause with values, reason and remedy, or None."""
        found = self.find(facts)
        return None if found is None else f"{found}: {self.reason}; {self.remedy}"


def _world(facts: Facts) -> str | None:
    if facts.world_size % (facts.tp * facts.pp) == 0:
        return None
    return (
        f"world size {facts.world_size} is not divisible by tensor_parallel_size={facts.tp} x "
        f"pipeline_parallel_size={facts.pp}"
    )


def _heads(facts: Facts) -> str | None:
    heads = facts.config.model.num_attention_heads
    if heads % facts.tp == 0:
        return None
    return f"num_attention_heads={heads} is not divisible by tensor_parallel_size={facts.tp}"


def _kv_heads(facts: Facts) -> str | None:
    heads = facts.config.model.kv_heads
    if heads % facts.tp == 0 or facts.tp % heads == 0:
        return None
    return f"num_kv_heads={heads} and tensor_parallel_size={facts.tp}: neither divides the other"


def _ffn(facts: Facts) -> str | None:
    size = facts.config.model.ffn_size
    if size % facts.tp == 0:
        return None
    return f"ffn_hidden_size={size} is not divisible by tensor_parallel_size={facts.tp}"


def _sequence(facts: Facts) -> str | None:
    length = facts.config.model.seq_length
    if not facts.config.parallel.sequence_parallel or length % facts.tp == 0:
        return None
    return (
        f"seq_length={length} is not divisible by tensor_parallel_size={facts.tp} with "
        "sequence_parallel"
    )


def _layers(facts: Facts) -> str | None:
    layers = facts.config.model.num_layers
    if facts.pp <= layers:
        return None
    return f"pipeline_parallel_size={facts.pp} is above num_layers={layers}"


def _pipeline_stage(facts: Facts) -> str | None:
    if facts.pp == 1 or facts.stage in (0, 1, None):
        return None
    return (
        f"pipeline_parallel_size={facts.pp} with zero_optimization.stage={facts.stage} is not "
        "supported"
    )


def _pipeline_overlap(facts: Facts) -> str | None:
    if facts.pp == 1 or facts.zero.get("overlap_comm") is not True:
        return None
    return f"zero_optimization.overlap_comm=true with pipeline_parallel_size={facts.pp}"


def _pipeline_timers(facts: Facts) -> str | None:
    values = facts.ds_config
    if facts.pp == 1 or not values.get("wall_clock_breakdown") or values.get("steps_per_print"):
        return None
    return f"wall_clock_breakdown=true with pipeline_parallel_size={facts.pp}"


def _bubble(facts: Facts) -> str | None:
    batch, dp = facts.config.batch, facts.world_size // (facts.tp * facts.pp)
    if facts.pp == 1 or dp == 0 or batch.global_batch_size % (batch.micro_batch_size * dp):
        return None
    micro_batches = batch.global_batch_size // (batch.micro_batch_size * dp)
    if micro_batches >= facts.pp:
        return None
    return f"{micro_batches} micro-batches a step are fewer than pipeline_parallel_size={facts.pp}"


def _low_precision(facts: Facts) -> str | None:
    precision = facts.config.training.precision
    if precision == "fp32" or facts.stage != 0:
        return None
    return f"--training.precision={precision} with zero_optimization.stage=0 is not supported"


def _fp16(facts: Facts) -> str | None:
    if facts.config.training.precision != "fp16" or facts.device != "cpu":
        return None
    return "--training.precision=fp16 cannot be trained on cpu"


def _parameter_offload(facts: Facts) -> str | None:
    target = facts.offload("param")
    if target == "none" or facts.stage in (3, None):
        return None
    return (
        f"zero_optimization.offload_param.device={target} needs stage 3 and stage is {facts.stage}"
    )


def _optimizer_offload(facts: Facts) -> str | None:
    target = facts.offload("optimizer")
    if target == "none" or facts.stage != 0:
        return None
    return (
        f"zero_optimization.offload_optimizer.device={target} needs stage 1, 2 or 3 and stage is 0"
    )


def _optimizer_nvme(facts: Facts) -> str | None:
    if facts.offload("optimizer") != "nvme" or facts.stage in (0, 3, None):
        return None
    return (
        f"zero_optimization.offload_optimizer.device=nvme needs stage 3 and stage is {facts.stage}"
    )


def _stage3_keys(facts: Facts) -> str | None:
    keys = [key for key in facts.zero if key.startswith(STAGE3_KEYS)]
    if not keys or facts.stage in (3, None):
        return None
    return f"zero_optimization.{{{', '.join(keys)}}} have no effect under stage {facts.stage}"


def _zero_plus_plus(facts: Facts) -> str | None:
    keys = [key for key in facts.zero if key.startswith(("zero_hpz_", "zero_quantized_"))]
    if not keys or facts.tp == 1:
        return None
    return f"zero_optimization.{{{', '.join(keys)}}} with tensor_parallel_size={facts.tp}"


def _async_save(facts: Facts) -> str | None:
    if not facts.config.checkpoint.async_save or facts.offload("optimizer") != "nvme":
        return None
    return "checkpoint.async_save=true with zero_optimization.offload_optimizer.device=nvme"


_TP = "choose a tensor_parallel_size that divides it"

RULES: tuple[Rule, ...] = (
    Rule(
        "ranks not a multiple of tensor_parallel_size x pipeline_parallel_size",
        "data parallelism takes what is left of the world",
        "start a multiple of that product",
        _world,
    ),
    Rule(
        "tensor_parallel_size that does not divide num_attention_heads",
        "each rank takes whole heads",
        _TP,
        _heads,
    ),
    Rule(
        "num_kv_heads and tensor_parallel_size of which neither divides the other",
        "key/value heads are split evenly, or each is shared by as many ranks",
        "choose a tensor_parallel_size that divides num_kv_heads or is a multiple of it",
        _kv_heads,
    ),
    Rule(
        "tensor_parallel_size that does not divide the width of the MLP",
        "it is split evenly",
        f"{_TP}, or another ffn_hidden_size",
        _ffn,
    ),
    Rule(
        "sequence_parallel with a seq_length that tensor_parallel_size does not divide",
        "the sequence is split evenly",
        "choose a multiple, or turn sequence_parallel off",
        _sequence,
    ),
    Rule(
        "pipeline_parallel_size above num_layers",
        "every stage holds a block",
        "choose at most one stage for each layer",
        _layers,
    ),
    Rule(
        "pipeline with ZeRO stage 2 or 3",
        "gradients accumulate over the micro-batches in flight, which ZeRO-2 and 3 cut up",
        "set stage 1, or pipeline_parallel_size 1",
        _pipeline_stage,
    ),
    Rule(
        "pipeline with overlap_comm",
        "DeepSpeed would turn it off, for its pipeline reduces at the end of the step",
        "remove it or set it to false",
        _pipeline_overlap,
    ),
    Rule(
        "pipeline with wall_clock_breakdown and no steps_per_print",
        "DeepSpeed's pipeline prints its timers every steps_per_print steps, and fails without",
        "give steps_per_print too, or remove it",
        _pipeline_timers,
    ),
    Rule(
        "async_save with the optimizer's state on NVMe",
        "its copy in host memory is what the offload is there to avoid",
        "leave --checkpoint.async_save out",
        _async_save,
    ),
    Rule(
        "fewer micro-batches than pipeline stages",
        "stages stand idle for (stages - 1) / (micro-batches + stages - 1) of the step",
        "raise --batch.global_batch_size or lower --batch.micro_batch_size",
        _bubble,
        is_warning=True,
    ),
    Rule(
        "bf16 or fp16 with ZeRO stage 0",
        "DeepSpeed cannot accumulate its gradients in fp32 there",
        "set stage 1, or precision fp32",
        _low_precision,
    ),
    Rule(
        "fp16 on the CPU",
        "most CPUs have no fp16 arithmetic, and no parity cell proves it on the others",
        "set --training.precision bf16 or fp32",
        _fp16,
    ),
    Rule(
        "offload_param without stage 3",
        "only stage 3 divides parameters",
        "set stage 3, or remove offload_param",
        _parameter_offload,
    ),
    Rule(
        "offload_optimizer with stage 0",
        "stage 0 has no partitioned optimizer to offload",
        "set stage 1, or remove offload_optimizer",
        _optimizer_offload,
    ),
    Rule(
        "offload_optimizer to nvme without stage 3",
        "DeepSpeed swaps optimizer state in stage 3 only",
        "set stage 3, or device cpu",
        _optimizer_nvme,
    ),
    Rule(
        "stage-3 keys under another stage",
        "a setting without effect hides a mistake",
        "remove them, or set stage 3",
        _stage3_keys,
    ),
    Rule(
        "ZeRO++ (zero_hpz_*, zero_quantized_*) with tensor parallelism",
        "no parity cell proves it",
        "remove them, or set tensor_parallel_size 1",
        _zero_plus_plus,
    ),
)
"""Every rule; faults are reported all together, in this order."""


def find_problems(facts: Facts) -> tuple[list[str], list[str]]:
    """Refusals and warnings that a run deserves."""
    refusals: list[str] = []
    warnings: list[str] = []
    for rule in RULES:
        if message := rule.message(facts):
            (warnings if rule.is_warning else refusals).append(message)
    return refusals, warnings


def rules_table() -> str:
    """The rules as a Markdown table."""
    lines = ["| combination | why | remedy |", "|---|---|---|"]
    for rule in RULES:
        name = f"{rule.combination} (a warning)" if rule.is_warning else rule.combination
        lines.append(f"| {name} | {rule.reason} | {rule.remedy} |")
    return "\n".join(lines) + "\n"
