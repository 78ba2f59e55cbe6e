"""The fp32 weights of a checkpoint by canonical name, whole, for inference and inspection.

Next file: `saver.py`, which writes them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from safetensors.torch import load_file

from megagpt.checkpoint.state import find_checkpoint, read_state
from megagpt.config.schema import Config

WEIGHTS_FILE = "weights.safetensors"


def gather_weights(engine: DeepSpeedEngine, *, keep: bool) -> dict[str, torch.Tensor]:
    """The fp32 master weights by canonical name; a collective, one parameter at a time.

    Args:
        engine: Under any ZeRO stage.
        keep: Whether this rank keeps them; others return {}.
    """
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if full is None:  # ZeRO-0: the parameter is its own fp32 master
            full = parameter
        if keep:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            weights[name] = full.detach().float().cpu().reshape(shape).clone().contiguous()
    return weights


def load_model_weights(path: Path | str) -> tuple[Config, dict[str, torch.Tensor], int]:
    """Reads the weights of a step folder, or of the newest step of a run folder.

    Returns:
        The configuration they were trained with, the fp32 weights by canonical name, and the step.

    Raises:
        ValueError: If there is no complete checkpoint, or its weights are missing or damaged.
    """
    directory = find_checkpoint(Path(path))
    state = read_state(directory)
    file = directory / WEIGHTS_FILE
    try:
        weights = load_file(str(file))
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); use another step_* folder") from None
    return state.config, weights, state.step
