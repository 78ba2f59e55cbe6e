"""The fp32 weights of a checkpoint by canonical name, whole, for inference and inspection.

Next file: `saver.py`, which writes them.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from safetensors import SafetensorError
from safetensors.torch import load_file

from megagpt.checkpoint.state import find_checkpoint, read_state
from megagpt.config.schema import Config
from megagpt.model.initialization import VOCABULARY_WEIGHTS
from megagpt.parallel.groups import ProcessGroups

WEIGHTS_FILE = "weights.safetensors"


def gather_weights(
    engine: DeepSpeedEngine, groups: ProcessGroups, *, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The fp32 master weights by canonical name, on rank 0; a collective.

    One parameter at a time, over tp and then from each pipeline stage.

    Args:
        engine: Of any layout.
        groups: Of the layout.
        vocab_size: Rows of embedding and output layer that are kept; the rest is padding.

    Returns:
        Whole tensors in host memory on rank 0; {} on the others.
    """
    topology = groups.topology
    weights: dict[str, torch.Tensor] = {}
    for pp in range(topology.pipeline_parallel_size):
        source = topology.rank(pp=pp, dp=0, tp=0)
        parameters = dict(engine.module.canonical_parameters()) if groups.pp_rank == pp else {}
        box: list[list[str]] = [list(parameters)]
        # broadcast over the world: the stage's names, so that all take part in its messages
        dist.broadcast_object_list(box, src=source)
        for name in box[0]:
            value = None
            if groups.pp_rank == pp:
                value = _whole(parameters[name], groups, engine.device)
                if name in VOCABULARY_WEIGHTS:
                    value = value[:vocab_size].contiguous()
            value = _to_rank0(value, source, groups.rank, engine.device)
            if value is not None:
                weights[name] = value
    return weights


def _whole(
    parameter: torch.nn.Parameter, groups: ProcessGroups, device: torch.device
) -> torch.Tensor:
    """The fp32 value of a parameter, gathered over dp by DeepSpeed and over tp here."""
    full = safe_get_full_fp32_param(parameter)
    if full is None:  # ZeRO-0: the parameter is its own fp32 master
        full = parameter
    shape = getattr(parameter, "ds_shape", parameter.shape)
    # An offloaded one comes in host memory, where NCCL cannot gather it.
    full = full.detach().to(device).float().reshape(shape).contiguous()
    dim = getattr(parameter, "tp_dim", None)
    if dim is None or groups.tp_group is None:
        return full
    shards = [torch.empty_like(full) for _ in range(groups.topology.tensor_parallel_size)]
    # all-gather over tp: shards of one dim -> whole
    dist.all_gather(shards, full, group=groups.tp_group)
    return torch.cat(shards, dim=dim)


def _to_rank0(
    value: torch.Tensor | None, source: int, rank: int, device: torch.device
) -> torch.Tensor | None:
    """Moves a tensor from its source to rank 0, where it is returned in host memory."""
    if source == 0:
        return value.cpu().clone() if rank == 0 and value is not None else None
    if rank == source:
        assert value is not None
        dist.send_object_list([tuple(value.shape)], dst=0)
        dist.send(value, dst=0)
    if rank != 0:
        return None
    shape: list = [None]
    dist.recv_object_list(shape, src=source)
    received = torch.empty(shape[0], device=device)
    dist.recv(received, src=source)
    return received.cpu()


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
