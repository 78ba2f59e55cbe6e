"""A trained model with its tokenizer, from a run folder or a step folder.

Next files: `generate.py`, `evaluate.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megagpt.checkpoint.weights import load_weights
from megagpt.config.schema import Config
from megagpt.data.datasets import data_tokenizer_path, first_manifest, first_prefix
from megagpt.data.tokenizers.load import load_tokenizer, tokenizer_sha256
from megagpt.data.tokenizers.protocol import Tokenizer
from megagpt.kernels.registry import Kernels
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import VOCABULARY_WEIGHTS


@dataclass(frozen=True)
class LoadedModel:
    """What generation and evaluation need of a checkpoint."""

    model: GPTModel
    """Whole, in float32, in evaluation mode."""
    tokenizer: Tokenizer
    """The one its data was made with."""
    config: Config
    """The configuration it was trained with."""
    step: int
    """Optimizer steps it was trained for."""


def build_model(
    config: Config,
    weights: dict[str, torch.Tensor],
    *,
    device: torch.device = torch.device("cpu"),  # noqa: B008, a constant
) -> GPTModel:
    """The model of a configuration with weights by canonical name.

    Args:
        config: As trained; model.vocab_size is set.
        weights: Whole tensors; a tied output weight is absent.
        device: Where the model will work.

    Raises:
        ValueError: If names or shapes are not those of the configuration.
    """
    model = GPTModel(config.model, kernels=Kernels("auto", device=device))
    parameters = dict(model.canonical_parameters())
    assert config.model.vocab_size is not None
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    for name in shapes.keys() & set(VOCABULARY_WEIGHTS):
        # Weights are saved without the padding of the vocabulary.
        shapes[name] = (config.model.vocab_size, config.model.hidden_size)
    given = {name: tuple(weight.shape) for name, weight in weights.items()}
    differing = sorted(
        name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name)
    )
    if differing:
        name = differing[0]
        raise ValueError(
            f"the checkpoint has {name} of shape {given.get(name)}, its configuration means "
            f"{shapes.get(name)} ({len(differing)} such); use another step_* folder"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.zero_()
            parameter[: len(weights[name])].copy_(weights[name])
    return model.requires_grad_(False).eval().to(device)


def load(
    checkpoint: Path | str, *, tokenizer_path: str | None = None, eod: str | None = None
) -> LoadedModel:
    """Opens a checkpoint for inference.

    Args:
        checkpoint: Run folder (its newest step) or step folder.
        tokenizer_path: Where the tokenizer is now; default: the one of the run's data.
        eod: Name of the token that ends documents, where the data does not tell.

    Raises:
        ValueError: If there is no whole checkpoint, or its tokenizer is missing or another one.
    """
    state, weights = load_weights(checkpoint)
    tokenizer = open_tokenizer(state.config, tokenizer_path, eod=eod)
    # The accelerator that DeepSpeed would take.
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    model = build_model(state.config, weights, device=device)
    return LoadedModel(model, tokenizer, state.config, state.step)


def open_tokenizer(config: Config, given: str | None, *, eod: str | None = None) -> Tokenizer:
    """The tokenizer of a trained model, checked against its data, where that is here, and its size.

    Args:
        config: As trained.
        given: Where the tokenizer is now; None: where the configuration or the data name it.
        eod: Name of the token that ends documents, where the data does not tell.

    Raises:
        ValueError: If it is nowhere, or another one.
    """
    prefix, manifest = first_prefix(config.data), first_manifest(config.data)
    path = given or data_tokenizer_path(config.data)
    if path is None:
        if prefix is None:
            raise ValueError("the checkpoint names no data and no tokenizer; give --tokenizer PATH")
        raise ValueError(
            f"the data {prefix} that names the tokenizer is not here; run in the folder of the "
            "training, or give --tokenizer PATH"
        )
    if manifest is not None and tokenizer_sha256(path) != manifest.tokenizer_sha256:
        raise ValueError(
            f"{path} is not the tokenizer that {prefix} was made with (its hash differs); "
            "give that one, --tokenizer PATH"
        )
    tokenizer = load_tokenizer(path, eod=manifest.eod if manifest is not None else eod)
    assert config.model.vocab_size is not None, "checkpoints hold the resolved configuration"
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} tokens, the model "
            f"{config.model.vocab_size}; give the tokenizer it was trained with, --tokenizer PATH"
        )
    return tokenizer
