"""All that a run imports or loads, done once in the process that ranks are forked from."""

import torch
import torch.utils.tensorboard  # noqa: F401
from deepspeed.ops.adam import FusedAdam
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401

import megagpt.config.command
import megagpt.training.loop
import megagpt.training.pretrain  # noqa: F401

torch.set_num_threads(1)
FusedAdam([torch.zeros(1)])  # loads the compiled op
ShareMemCommBuilder().load(verbose=False)
