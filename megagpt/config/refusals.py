"""The table of what is refused or warned of beyond one section, with reason and remedy.

Settings are checked when they are read, layouts before any process group exists; docs/layouts.md
is made from it. Pure: no torch, no DeepSpeed. Callers: `command_line.py`, `deepspeed_config.py`.
"""

from __future__ import annotations

from megagpt.config.deepspeed_keys import STAGE3_KEYS
from megagpt.config.rule import Facts, Rule
from megagpt.config.schema import Config


def _warmup(config: Config) -> str | None:
    warmup, decay = config.optimizer.warmup_steps, config.decay_steps
    if warmup < decay:
        return None
    return f"warmup_steps={warmup} leaves nothing of decay_steps={decay}"


def _wsd(config: Config) -> str | None:
    warmup, decay = config.optimizer.warmup_steps, config.decay_steps
    if warmup >= decay or config.wsd_decay_steps <= decay - warmup:
        return None
    return (
        f"wsd_decay_steps={config.wsd_decay_steps} does not fit between warmup_steps={warmup} and "
        f"decay_steps={decay}"
    )


def _world(facts: Facts) -> str | None:
    if facts.dp is not None:
        return None
    return (
        f"world size {facts.world_size} is not divisible by tensor_parallel_size={facts.tp} x "
        f"pipeline_parallel_size={facts.pp}"
    )


def _batch(facts: Facts) -> str | None:
    batch, dp = facts.config.batch, facts.dp
    if dp is None or batch.gradient_accumulation_steps(dp) is not None:
        return None
    return (
        f"global_batch_size={batch.global_batch_size} is not divisible by micro_batch_size="
        f"{batch.micro_batch_size} x data-parallel size {dp} = {batch.micro_batch_size * dp}"
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
    if facts.dp is None:
        return None
    micro_batches = facts.config.batch.gradient_accumulation_steps(facts.dp)
    if micro_batches is None or micro_batches >= facts.pp:
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

_OF_SETTINGS: tuple[Rule[Config], ...] = (
    Rule(
        "warmup_steps that reach decay_steps, by default train_steps",
        "the schedule goes on after its warm-up",
        "choose a shorter warm-up",
        _warmup,
    ),
    Rule(
        "wsd_decay_steps longer than decay_steps without warmup_steps",
        "the final decay begins after the warm-up",
        "choose fewer, or a shorter warm-up",
        _wsd,
    ),
)

_OF_LAYOUTS: tuple[Rule[Facts], ...] = (
    Rule(
        "ranks not a multiple of tensor_parallel_size x pipeline_parallel_size",
        "data parallelism takes what is left of the world",
        "start a multiple of that product",
        _world,
    ),
    Rule(
        "global_batch_size not a multiple of micro_batch_size x data-parallel ranks",
        "every rank runs the same number of micro-batches, all of one size",
        "choose a multiple of that product for --batch.global_batch_size",
        _batch,
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
