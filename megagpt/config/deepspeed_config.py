"""One owner for every value: brings the DeepSpeed JSON and the typed configuration together.

Shared keys are filled in, kept when equal, refused when different; all faults are reported at once.
Imports nothing of DeepSpeed. Next file: `deepspeed_keys.py`.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.config.deepspeed_keys import (
    ACCEPTED_KEYS,
    AUTO,
    REFUSED_KEYS,
    Kind,
    misfit,
    refusal,
    where_it_belongs,
)
from megagpt.config.dotted_keys import leaves
from megagpt.config.refusals import Device, Facts, find_problems
from megagpt.config.schema import Config

DEFAULT_DS_CONFIG: dict[str, Any] = {"zero_optimization": {"stage": 1}}
"""Used when no JSON is named: the least ZeRO that trains in every precision."""


_SMALLEST_BUCKET = 50_000_000


@dataclass(frozen=True)
class ResolvedDeepSpeedConfig:
    """What `deepspeed.initialize` is given, and where each value came from."""

    values: dict[str, Any]
    """The JSON without `"auto"`, optimizer and scheduler."""
    sources: dict[str, str]
    """By dotted key: `ds_config` (stated), `config` (copied), `derived` (computed) or `default`."""
    warnings: tuple[str, ...] = ()
    """What works, but badly."""


def resolve_ds_config(
    config: Config,
    ds_config: dict[str, Any],
    *,
    world_size: int,
    ds_config_path: str,
    device: Device,
) -> ResolvedDeepSpeedConfig:
    """Fills the DeepSpeed JSON from the typed configuration and refuses what does not fit.

    Args:
        config: The typed configuration; owns batch, precision, clipping, optimizer and schedule.
        ds_config: The JSON as it was written; owns ZeRO, offload and communication. Not modified.
        world_size: Ranks, over all parallel axes.
        ds_config_path: Name of the JSON in error messages; empty where none was named.
        device: What the run trains on.

    Returns:
        The values for `deepspeed.initialize`, with the source of each.

    Raises:
        ValueError: One line with every unknown key, wrong value, conflict and unsupported
            combination.
    """
    resolver = _Resolver(ds_config)
    resolver.check_keys(resolver.values, ACCEPTED_KEYS, prefix="")
    facts = Facts(config, resolver.values, world_size, device)
    if facts.dp is not None:  # else it is refused below
        _fill_batch(resolver, config, facts.dp)
    _fill_precision(resolver, config)
    _fill_optimizer(resolver, config)
    _fill_zero(resolver, config)
    # On by default, it waits for the device twice a micro-batch (0.19.8, `ThroughputTimer`).
    resolver.fill_absent("timers.throughput.enabled", False)
    for path, value in leaves(resolver.values).items():
        if value == AUTO:
            resolver.problems.append(
                f'{path}="auto" cannot be filled in; give a value or remove the key'
            )
    refusals, warnings = find_problems(facts)
    resolver.problems += refusals
    if resolver.problems:
        where = f"{ds_config_path}: " if ds_config_path else ""
        raise ValueError(where + "; ".join(resolver.problems))
    for section in ("optimizer", "scheduler"):
        # The trainer hands its own objects in; DeepSpeed would silently ignore these.
        resolver.values.pop(section, None)
    sources = {path: resolver.sources.get(path, "ds_config") for path in leaves(resolver.values)}
    return ResolvedDeepSpeedConfig(resolver.values, sources, warnings=tuple(warnings))


def format_resolved_table(
    config: Config, config_sources: dict[str, str], resolved: ResolvedDeepSpeedConfig
) -> str:
    """An aligned table of every key, its value and its source, the DeepSpeed JSON's keys last.

    A default that was filled in after parsing (the vocabulary, from the data) counts as derived.
    """
    defaults = leaves(Config())
    rows = [("key", "value", "source")]
    for key, value in leaves(config).items():
        source = config_sources.get(key, "default")
        if source == "default" and value != defaults[key]:
            source = "derived"
        rows.append((key, json.dumps(value), source))
    json_source = config_sources.get("ds_config", "ds_config")
    for key, value in leaves(resolved.values).items():
        source = resolved.sources[key]
        if source == "ds_config":
            source = f"ds_config {json_source}"
        rows.append((f"ds_config.{key}", json.dumps(value), source))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"{k:<{widths[0]}}  {v:<{widths[1]}}  {s}" for k, v, s in rows)


class _Resolver:
    """The JSON while it is being resolved, with the faults found so far."""

    def __init__(self, ds_config: dict[str, Any]) -> None:
        self.values = copy.deepcopy(ds_config)
        self.sources: dict[str, str] = {}
        self.problems: list[str] = []
        self.rejected: set[str] = set()

    def check_keys(self, section: dict[str, Any], keys: dict[str, Kind], *, prefix: str) -> None:
        """Notes and takes out unknown and refused keys and values of a wrong type."""
        for name, value in list(section.items()):
            path = f"{prefix}{name}"
            kind = keys.get(name)
            problem = None
            if value is None and (kind is not None or path in REFUSED_KEYS):
                # What Accelerate and others write for "not given".
                del section[name]
            elif path in REFUSED_KEYS:
                problem = f"{path} is refused: {refusal(path, value)}"
            elif kind is None:
                rest = f"; the keys here are {', '.join(keys)}" if prefix else "; remove it"
                problem = f"unknown key '{path}'{where_it_belongs(name, keys, prefix) or rest}"
            elif isinstance(kind, dict):
                if value == AUTO and prefix == "" and name in _WHOLE_AUTO:
                    del section[name]
                elif isinstance(value, dict):
                    self.check_keys(value, kind, prefix=f"{path}.")
                else:
                    example = json.dumps({next(iter(kind)): "..."})
                    problem = (
                        f"{path}={json.dumps(value)} has the wrong type; give an object such as "
                        f"{example}"
                    )
            elif value != AUTO and (fitting := misfit(value, kind)):
                problem = f"{path}={json.dumps(value)} is not allowed; give {fitting}"
            if problem:
                self.problems.append(problem)
                self.rejected.add(path)
                del section[name]
            elif kind == "int" and name in section and value != AUTO:
                section[name] = int(value)

    def get(self, path: str) -> Any:
        """The value at a dotted path, None if it is absent."""
        section: Any = self.values
        for name in path.split("."):
            section = section.get(name) if isinstance(section, dict) else None
        return section

    def fill(
        self,
        path: str,
        expected: Any,
        *,
        owner: str,
        source: str = "config",
        when_absent: bool = True,
    ) -> None:
        """Fills an absent or "auto" key, keeps an equal one, notes a different one.

        Args:
            path: Dotted path in the JSON.
            expected: The value that the typed configuration asks for.
            owner: What determines it, for the message: a flag, or a rule in words.
            source: Noted when the value is filled in.
            when_absent: Fill an absent key too, not only an "auto".
        """
        value = self.get(path)
        if value is None and not when_absent:
            return
        if value is None or value == AUTO:
            *sections, name = path.split(".")
            section = self.values
            for key in sections:
                section = section.setdefault(key, {})
            section[name] = expected
            self.sources[path] = source
        elif not _equal(value, expected):
            self.conflict(path, value, f"{owner}={json.dumps(expected)}")

    def fill_absent(self, path: str, value: Any) -> None:
        """Fills a key that is free, and was left out or is "auto"."""
        if self.get(path) in (None, AUTO):
            self.fill(path, value, owner="", source="derived")

    def conflict(self, path: str, value: Any, owned: str) -> None:
        """Notes a value that differs from what its owner says."""
        self.problems.append(
            f"{path}={json.dumps(value)} conflicts with {owned} "
            '(write "auto" in the JSON, or make them equal)'
        )


_SCHEDULES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
"""DeepSpeed's names of `optimizer.schedule`; wsd has none."""

# Written as a whole: "optimizer": "auto".
_WHOLE_AUTO = ("optimizer", "scheduler")


def _fill_batch(resolver: _Resolver, config: Config, data_parallel_size: int) -> None:
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    micro, steps, total = (resolver.get(name) for name in names)
    if all(isinstance(v, (int, float)) for v in (micro, steps, total)):
        product = micro * steps * data_parallel_size
        if product != total:
            resolver.problems.append(
                f"train_batch_size does not multiply out: {names[0]} {micro} x {names[1]} {steps} "
                f"x data-parallel size {data_parallel_size} = {product} != {total}"
            )
    batch = config.batch
    resolver.fill(names[2], batch.global_batch_size, owner="--batch.global_batch_size")
    resolver.fill(names[0], batch.micro_batch_size, owner="--batch.micro_batch_size")
    accumulation = batch.gradient_accumulation_steps(data_parallel_size)
    if accumulation is None:  # refused below
        resolver.values.pop(names[1], None)
        return
    resolver.fill(
        names[1],
        accumulation,
        owner="--batch.global_batch_size / (--batch.micro_batch_size x data-parallel size "
        f"{data_parallel_size})",
        source="derived",
    )


def _fill_precision(resolver: _Resolver, config: Config) -> None:
    precision = config.training.precision
    for name in ("bf16", "fp16"):
        enabled = precision == name
        stated = resolver.get(f"{name}.enabled")
        if isinstance(stated, bool) and stated != enabled:
            resolver.conflict(f"{name}.enabled", stated, f"--training.precision={precision}")
        elif enabled or resolver.get(name) is not None:
            resolver.fill(f"{name}.enabled", enabled, owner="--training.precision")
    # DeepSpeed's default accumulates in the weights' type, and reduces in it too. The latter may be
    # asked for: half of the bytes, and sums over dp that are rounded to 8 bits.
    owned = ["data_types.grad_accum_dtype", "communication_data_type"]
    if precision == "bf16" and resolver.get(owned[1]) == "bf16":
        owned.pop()
    for path in owned:
        resolver.fill(
            path,
            "fp32",
            owner="the rule that gradients accumulate and reduce in fp32",
            source="derived",
            when_absent=precision != "fp32",
        )


def _fill_optimizer(resolver: _Resolver, config: Config) -> None:
    """Compares the sections that megagpt owns with its own optimizer and schedule."""
    optimizer = config.optimizer

    def compare(path: str, expected: Any, owner: str) -> None:
        resolver.fill(path, expected, owner=owner, when_absent=False)

    resolver.fill("gradient_clipping", optimizer.clip_grad, owner="--optimizer.clip_grad")
    kind = resolver.get("optimizer.type")
    if isinstance(kind, str) and kind.lower() == "adamw":
        resolver.values["optimizer"]["type"] = "AdamW"
    compare("optimizer.type", "AdamW", "the optimizer of megagpt")
    for name in ("lr", "betas", "eps", "weight_decay"):
        compare(f"optimizer.params.{name}", getattr(optimizer, name), f"--optimizer.{name}")

    _compare_schedules(resolver, optimizer.schedule)
    ratio = optimizer.min_lr / optimizer.lr
    for name, expected, owner in (
        ("warmup_min_lr", 0.0, "the warm-up's start"),
        ("warmup_max_lr", optimizer.lr, "--optimizer.lr"),
        ("warmup_num_steps", optimizer.warmup_steps, "--optimizer.warmup_steps"),
        ("warmup_type", "linear", "the warm-up's shape"),
        ("warmup_min_ratio", 0.0, "the warm-up's start"),
        ("cos_min_ratio", ratio, "--optimizer.min_lr / --optimizer.lr"),
        ("total_num_steps", config.decay_steps, "--optimizer.decay_steps"),
    ):
        compare(f"scheduler.params.{name}", expected, owner)


def _compare_schedules(resolver: _Resolver, ours: str) -> None:
    """Names the schedule that a scheduler of the JSON is, where it is another one."""
    theirs = resolver.get("scheduler.type")
    if theirs is None:
        return
    equal = _SCHEDULES.get(theirs) if isinstance(theirs, str) else None
    if theirs == AUTO:  # whatever it is, its settings are compared
        resolver.values["scheduler"].pop("type")
    elif equal != ours:
        give = f"give --optimizer.schedule {equal}, or " if equal else ""
        resolver.problems.append(
            f"scheduler.type={json.dumps(theirs)} conflicts with --optimizer.schedule {ours} "
            f'({give}write "auto" in the JSON)'
        )


def _fill_zero(resolver: _Resolver, config: Config) -> None:
    """Sizes "auto" buckets and thresholds by Hugging Face's formulae, and places swap files.

    But no bucket is so small that a small model goes over the wire in hundreds of messages.
    """
    rejected = resolver.rejected & {"zero_optimization", "zero_optimization.stage"}
    if resolver.get("zero_optimization.stage") is None and not rejected:
        # DeepSpeed's default, made visible.
        resolver.fill("zero_optimization.stage", 0, owner="", source="default")
    hidden = config.model.hidden_size
    for name, size in (
        ("reduce_bucket_size", max(_SMALLEST_BUCKET, hidden * hidden)),
        ("stage3_prefetch_bucket_size", max(_SMALLEST_BUCKET, 9 * hidden * hidden // 10)),
        ("stage3_param_persistence_threshold", 10 * hidden),
    ):
        path = f"zero_optimization.{name}"
        if resolver.get(path) == AUTO:
            resolver.fill(path, size, owner="", source="derived")
    for section in ("offload_optimizer", "offload_param"):
        path = f"zero_optimization.{section}.nvme_path"
        on_nvme = resolver.get(f"zero_optimization.{section}.device") == "nvme"
        if on_nvme and resolver.get(path) in (None, AUTO):
            # In the run folder, so that no two runs share it.
            resolver.fill(path, str(Path(config.output_dir) / "nvme"), owner="", source="derived")


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        # A ratio of two settings is equal to its decimal spelling up to rounding.
        return math.isclose(left, right, rel_tol=1e-12)
    return left == right
