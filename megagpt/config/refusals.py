"""The table of what is refused or warned of beyond one section, with reason and remedy.

Settings are checked when they are read, layouts before any process group exists; docs/layouts.md
is made from it. Pure: no torch, no DeepSpeed. Callers: `command_line.py`, `deepspeed_config.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from megagpt.config.deepspeed_keys import AUTO
from megagpt.config.schema import Config

Device = Literal["cpu", "cuda"]
Seen = TypeVar("Seen")
_ZERO_PLUS_PLUS = ("zero_hpz_", "zero_quantized_")


@dataclass(frozen=True)
class Facts:
    """What a rule of layouts looks at."""

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
    def dp(self) -> int | None:
        """Data-parallel ranks; None where tp x pp does not divide the world, a fault of its own."""
        ranks, rest = divmod(self.world_size, self.tp * self.pp)
        return None if rest else ranks

    @property
    def zero(self) -> dict[str, Any]:
        """The section zero_optimization."""
        return self.ds_config.get("zero_optimization", {})

    @property
    def stage(self) -> int | None:
        """The ZeRO stage; None where what is stated is none, a fault that is reported already."""
        stage = self.zero.get("stage")
        return None if stage == AUTO else stage

    @property
    def samples_at_once(self) -> int | None:
        """Samples of one micro-batch on all ranks; None where dp is."""
        return None if self.dp is None else self.config.batch.micro_batch_size * self.dp

    @property
    def micro_batches(self) -> int | None:
        """Of a rank in a step; None where they do not divide, or dp is None."""
        return None if self.dp is None else self.config.batch.gradient_accumulation_steps(self.dp)

    def offload(self, what: Literal["optimizer", "param"]) -> str:
        """Device of an offload section, `none` without one."""
        return self.zero.get(f"offload_{what}", {}).get("device", "none")

    @property
    def stage3_keys(self) -> str:
        """The keys of zero_optimization that have an effect under stage 3 only."""
        return ", ".join(key for key in self.zero if key.startswith(("stage3_", *_ZERO_PLUS_PLUS)))

    @property
    def hpz(self) -> int:
        """Ranks that hold a second copy of the weights together; 1 is none."""
        return self.zero.get("zero_hpz_partition_size", 1)

    @property
    def scales_before_reducing(self) -> bool:
        """Whether gradients are divided before they are summed over dp."""
        values = self.ds_config
        predivides = values.get("gradient_predivide_factor", 1.0) != 1.0
        return predivides or values.get("prescale_gradients", False)

    @property
    def reduces_by_scatter(self) -> bool:
        """DeepSpeed's default."""
        return self.zero.get("reduce_scatter", True)


@dataclass(frozen=True)
class Rule(Generic[Seen]):
    """One combination that does not work: of settings (`Config`), or in a layout (`Facts`)."""

    combination: str
    """In words, for the docs."""
    is_there: Callable[[Seen], bool]
    """Whether it has been asked for."""
    found: str
    """Where it is there, the offending values; filled in from what the rule sees, as {0.name}."""
    reason: str
    """Why."""
    remedy: str
    """What to change."""
    is_warning: bool = False
    """Whether the run goes on."""

    def message(self, seen: Seen) -> str | None:
        """One clause with values, reason and remedy, or None."""
        if not self.is_there(seen):
            return None
        return f"{self.found.format(seen)}: {self.reason}; {self.remedy}"


_TP = "choose a tensor_parallel_size that divides it"

_OF_SETTINGS: tuple[Rule[Config], ...] = (
    Rule(
        "warmup_steps that reach decay_steps, by default train_steps, but with schedule=constant",
        lambda c: c.optimizer.schedule != "constant" and c.optimizer.warmup_steps >= c.decay_steps,
        "warmup_steps={0.optimizer.warmup_steps} leaves nothing of decay_steps={0.decay_steps}",
        "the schedule goes on after its warm-up",
        "choose a shorter warm-up",
    ),
    Rule(
        "wsd_decay_steps longer than decay_steps without warmup_steps",
        lambda c: 0 < c.decay_steps - c.optimizer.warmup_steps < c.wsd_decay_steps,
        "wsd_decay_steps={0.wsd_decay_steps} does not fit between warmup_steps="
        "{0.optimizer.warmup_steps} and decay_steps={0.decay_steps}",
        "the final decay begins after the warm-up",
        "choose fewer, or a shorter warm-up",
    ),
    Rule(
        "a seed of more than 32 bits with data.order=megatron",
        lambda c: c.data.order == "megatron" and c.training.seed >= 2**32,
        "seed={0.training.seed} with data.order=megatron",
        "Megatron-LM's order takes 32 bits of it",
        "choose a seed below 4294967296",
    ),
)

_OF_LAYOUTS: tuple[Rule[Facts], ...] = (
    Rule(
        "ranks not a multiple of tensor_parallel_size x pipeline_parallel_size",
        lambda f: f.dp is None,
        "world size {0.world_size} is not divisible by tensor_parallel_size={0.tp} x "
        "pipeline_parallel_size={0.pp}",
        "data parallelism takes what is left of the world",
        "start a multiple of that product",
    ),
    Rule(
        "global_batch_size not a multiple of micro_batch_size x data-parallel ranks",
        lambda f: f.dp is not None and f.micro_batches is None,
        "global_batch_size={0.config.batch.global_batch_size} is not divisible by micro_batch_size="
        "{0.config.batch.micro_batch_size} x data-parallel size {0.dp} = {0.samples_at_once}",
        "every rank runs the same number of micro-batches, all of one size",
        "choose a multiple of that product for --batch.global_batch_size",
    ),
    Rule(
        "tensor_parallel_size that does not divide num_attention_heads",
        lambda f: f.config.model.num_attention_heads % f.tp != 0,
        "num_attention_heads={0.config.model.num_attention_heads} is not divisible by "
        "tensor_parallel_size={0.tp}",
        "each rank takes whole heads",
        _TP,
    ),
    Rule(
        "num_kv_heads and tensor_parallel_size of which neither divides the other",
        lambda f: f.config.model.kv_heads % f.tp != 0 != f.tp % f.config.model.kv_heads,
        "num_kv_heads={0.config.model.kv_heads} and tensor_parallel_size={0.tp}: neither "
        "divides the other",
        "key/value heads are split evenly, or each is shared by as many ranks",
        "choose a tensor_parallel_size that divides num_kv_heads or is a multiple of it",
    ),
    Rule(
        "tensor_parallel_size that does not divide the width of the MLP",
        lambda f: f.config.model.ffn_size % f.tp != 0,
        "ffn_hidden_size={0.config.model.ffn_size} is not divisible by tensor_parallel_size={0.tp}",
        "it is split evenly",
        f"{_TP}, or another ffn_hidden_size",
    ),
    Rule(
        "sequence_parallel with a seq_length that tensor_parallel_size does not divide",
        lambda f: f.config.parallel.sequence_parallel and f.config.model.seq_length % f.tp != 0,
        "seq_length={0.config.model.seq_length} is not divisible by tensor_parallel_size={0.tp} "
        "with sequence_parallel",
        "the sequence is split evenly",
        "choose a multiple, or turn sequence_parallel off",
    ),
    Rule(
        "pipeline_parallel_size above num_layers",
        lambda f: f.pp > f.config.model.num_layers,
        "pipeline_parallel_size={0.pp} is above num_layers={0.config.model.num_layers}",
        "every stage holds a block",
        "choose at most one stage for each layer",
    ),
    Rule(
        "pipeline with ZeRO stage 2 or 3",
        lambda f: f.pp > 1 and f.stage not in (0, 1, None),
        "pipeline_parallel_size={0.pp} with zero_optimization.stage={0.stage} is not supported",
        "gradients accumulate over the micro-batches in flight, which ZeRO-2 and 3 cut up",
        "set stage 1, or pipeline_parallel_size 1",
    ),
    Rule(
        "pipeline with overlap_comm",
        lambda f: f.pp > 1 and f.zero.get("overlap_comm") is True,
        "zero_optimization.overlap_comm=true with pipeline_parallel_size={0.pp}",
        "DeepSpeed would turn it off, for its pipeline reduces at the end of the step",
        "remove it or set it to false",
    ),
    Rule(
        "pipeline with wall_clock_breakdown and no steps_per_print",
        lambda f: (
            f.pp > 1
            and bool(f.ds_config.get("wall_clock_breakdown"))
            and not f.ds_config.get("steps_per_print")
        ),
        "wall_clock_breakdown=true with pipeline_parallel_size={0.pp}",
        "DeepSpeed's pipeline prints its timers every steps_per_print steps, and fails without",
        "give steps_per_print too, or remove it",
    ),
    Rule(
        "async_save with the optimizer's state on NVMe",
        lambda f: f.config.checkpoint.async_save and f.offload("optimizer") == "nvme",
        "checkpoint.async_save=true with zero_optimization.offload_optimizer.device=nvme",
        "its copy in host memory is what the offload is there to avoid",
        "leave --checkpoint.async_save out",
    ),
    Rule(
        "fewer micro-batches than pipeline stages",
        lambda f: f.micro_batches is not None and f.micro_batches < f.pp,
        "{0.micro_batches} micro-batches a step are fewer than pipeline_parallel_size={0.pp}",
        "stages stand idle for (stages - 1) / (micro-batches + stages - 1) of the step",
        "raise --batch.global_batch_size or lower --batch.micro_batch_size",
        is_warning=True,
    ),
    Rule(
        "bf16 or fp16 with ZeRO stage 0",
        lambda f: f.config.training.precision != "fp32" and f.stage == 0,
        "--training.precision={0.config.training.precision} with zero_optimization.stage=0 "
        "is not supported",
        "DeepSpeed cannot accumulate its gradients in fp32 there",
        "set stage 1, or precision fp32",
    ),
    Rule(
        "fp16 on the CPU",
        lambda f: f.config.training.precision == "fp16" and f.device == "cpu",
        "--training.precision=fp16 cannot be trained on cpu",
        "most CPUs have no fp16 arithmetic, and no parity cell proves it on the others",
        "set --training.precision bf16 or fp32",
    ),
    Rule(
        "offload_param without stage 3",
        lambda f: f.offload("param") != "none" and f.stage not in (3, None),
        "zero_optimization.offload_param.device={0.zero[offload_param][device]} needs stage 3 and "
        "stage is {0.stage}",
        "only stage 3 divides parameters",
        "set stage 3, or remove offload_param",
    ),
    Rule(
        "offload_optimizer with stage 0",
        lambda f: f.offload("optimizer") != "none" and f.stage == 0,
        "zero_optimization.offload_optimizer.device={0.zero[offload_optimizer][device]} needs "
        "stage 1, 2 or 3 and stage is 0",
        "stage 0 has no partitioned optimizer to offload",
        "set stage 1, or remove offload_optimizer",
    ),
    Rule(
        "offload_optimizer to nvme without stage 3",
        lambda f: f.offload("optimizer") == "nvme" and f.stage not in (0, 3, None),
        "zero_optimization.offload_optimizer.device=nvme needs stage 3 and stage is {0.stage}",
        "DeepSpeed swaps optimizer state in stage 3 only",
        "set stage 3, or device cpu",
    ),
    Rule(
        "stage-3 keys under another stage",
        lambda f: bool(f.stage3_keys) and f.stage not in (3, None),
        "zero_optimization.{{{0.stage3_keys}}} have no effect under stage {0.stage}",
        "a setting without effect hides a mistake",
        "remove them, or set stage 3",
    ),
    Rule(
        "zero_hpz_partition_size with tensor parallelism",
        lambda f: f.hpz > 1 and f.tp > 1,
        "zero_optimization.zero_hpz_partition_size={0.hpz} with tensor_parallel_size={0.tp}",
        "DeepSpeed makes its groups of neighbouring ranks, which hold parts of different weights",
        "remove it, or set tensor_parallel_size 1",
    ),
    Rule(
        "zero_hpz_partition_size that does not divide the ranks",
        lambda f: f.hpz < 1 or f.world_size % min(f.hpz, f.world_size) > 0,
        "zero_optimization.zero_hpz_partition_size={0.hpz} on {0.world_size} ranks",
        "each group of so many ranks holds a second copy of the weights",
        "choose a divisor of the ranks, best the GPUs of a host",
    ),
    Rule(
        "gradients divided before they are reduced, with reduce_scatter, beyond stage 1",
        lambda f: f.stage in (2, 3) and f.scales_before_reducing and f.reduces_by_scatter,
        "prescale_gradients or gradient_predivide_factor under stage {0.stage} with reduce_scatter",
        "DeepSpeed has no such path",
        "remove them, or set zero_optimization.reduce_scatter false",
    ),
)

RULES: tuple[Rule[Config] | Rule[Facts], ...] = (*_OF_SETTINGS, *_OF_LAYOUTS)
"""Every rule; faults are reported all together, in this order."""


def refuse_settings(config: Config) -> None:
    """Refuses settings that no layout can run.

    Raises:
        ValueError: One line with all of them.
    """
    if problems := [found for rule in _OF_SETTINGS if (found := rule.message(config))]:
        raise ValueError("; ".join(problems))


def find_problems(facts: Facts) -> tuple[list[str], list[str]]:
    """Refusals and warnings that a run deserves, by all of the rules."""
    found = [(rule.is_warning, rule.message(facts.config)) for rule in _OF_SETTINGS]
    found += [(rule.is_warning, rule.message(facts)) for rule in _OF_LAYOUTS]
    refusals = [message for is_warning, message in found if message and not is_warning]
    return refusals, [message for is_warning, message in found if message and is_warning]


def rules_table() -> str:
    """The rules as a Markdown table."""
    lines = ["| combination | why | remedy |", "|---|---|---|"]
    for rule in RULES:
        name = f"{rule.combination} (a warning)" if rule.is_warning else rule.combination
        lines.append(f"| {name} | {rule.reason} | {rule.remedy} |")
    return "\n".join(lines) + "\n"
