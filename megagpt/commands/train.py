"""Pretrains a GPT: on this process, or as one of the ranks of a launcher."""

from megagpt.training.pretrain import pretrain as pretrain
