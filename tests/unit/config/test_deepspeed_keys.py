"""The table of keys against the installed release of DeepSpeed."""

from __future__ import annotations

from typing import Any

from megagpt.config.deepspeed_keys import ACCEPTED_KEYS, REFUSED_KEYS


def _table_keys(path: str) -> set[str]:
    """Accepted and refused keys of one section."""
    section: Any = ACCEPTED_KEYS
    for name in path.split(".") if path else []:
        section = section[name]
    prefix = f"{path}." if path else ""
    refused = {k.removeprefix(prefix) for k in REFUSED_KEYS if k.startswith(prefix)}
    return set(section) | {k for k in refused if "." not in k}


def test_section_keys_equal_the_fields_of_the_installed_release() -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    for path, model in {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "comms_logger": CommsLoggerConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }.items():
        theirs = {field.alias or name for name, field in model.model_fields.items()}
        removed = set(_REMOVED_ZERO_CONFIG_KEYS) if path == "zero_optimization" else set()
        assert _table_keys(path) == theirs | removed, path


def test_top_level_keys_are_those_that_the_installed_release_reads() -> None:
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    class Recorder(dict):
        """Notes which keys are asked for."""

        asked: set[str] = set()

        def __contains__(self, key: object) -> bool:
            self.asked.add(str(key))
            return super().__contains__(key)

        def get(self, key: Any, default: Any = None) -> Any:
            self.asked.add(str(key))
            return super().get(key, default)

        def keys(self) -> Any:
            return self

        def __copy__(self) -> Recorder:
            return self

    DeepSpeedConfig(Recorder(train_batch_size=1))
    assert "gradient_clipping" in Recorder.asked and "tensorboard" in Recorder.asked
    assert not Recorder.asked - _table_keys("") - {"data_sampling"}
    assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED_KEYS)
    accepted_but_unread = set(ACCEPTED_KEYS) - Recorder.asked
    assert not accepted_but_unread
    assert set(AIO_DEFAULT_DICT) == _table_keys("aio")
    profiler = set(vars(DeepSpeedFlopsProfilerConfig({})))
    assert profiler == _table_keys("flops_profiler")
