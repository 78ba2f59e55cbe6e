"""The weights of a checkpoint, whole, for inference and inspection.

Next file: `format/reader.py`, which finds them in the files of any layout.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megagpt.checkpoint.directory import find_checkpoint
from megagpt.checkpoint.format.manifest import CheckpointState
from megagpt.checkpoint.format.reader import CheckpointReader


def load_weights(path: Path | str) -> tuple[CheckpointState, dict[str, torch.Tensor]]:
    """Reads the weights of a step folder, or of the newest step of a run folder.

    Returns:
        The state of the run, and the fp32 weights by canonical name.

    Raises:
        ValueError: If there is no complete checkpoint, or it is damaged.
    """
    with CheckpointReader(find_checkpoint(Path(path))) as reader:
        manifest = reader.manifest
        return manifest.state, {n: torch.from_numpy(reader.tensor(n)) for n in manifest.tensors}
