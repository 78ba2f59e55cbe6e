"""Pretrains a GPT: on this process, or as one of the ranks of a launcher."""

from __future__ import annotations

from megagpt.config.command_line import build_parser as build_parser
from megagpt.training.pretrain import pretrain


def main(arguments: list[str]) -> int:
    """Trains; the exit code is 75 when a signal stopped it and its state is saved."""
    return pretrain(arguments)
