"""Pretrains a GPT: `deepspeed launch/pretrain.py --config RUN.yaml --ds_config JSON`.

The same script runs under `deepspeed`, `torchrun` and plain `python`.
"""

import sys

from megagpt.config.command import run_command
from megagpt.training.pretrain import pretrain

if __name__ == "__main__":
    sys.exit(run_command(pretrain))
