"""ZeRO-3 construction: the plain model's values bit for bit, and at most shard + one layer."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from megagpt.config.schema import ModelConfig, ParallelConfig
from megagpt.model.gpt import GPTModel
from megagpt.parallel.groups import ProcessGroups
from megagpt.parallel.topology import ParallelTopology
from megagpt.testing.distributed import run_distributed

CONFIG = ModelConfig(
    num_layers=2, hidden_size=20, num_attention_heads=2, ffn_hidden_size=51, seq_length=9,
    vocab_size=37, vocab_padding_multiple=1,
)  # fmt: skip
LLAMA = dataclasses.replace(
    CONFIG, normalization="rmsnorm", position_embedding="rope", activation="swiglu", bias=False,
    num_kv_heads=1, tie_embeddings=False,
)  # fmt: skip
# Deep, and with a vocabulary smaller than a layer, so that "one layer" is one block.
DEEP = dataclasses.replace(CONFIG, num_layers=12, hidden_size=128, ffn_hidden_size=512)


def ds_config(stage, dtype, offload=False):
    zero = {"stage": stage}
    if offload:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
    }


def value_cells(rank, world_size):
    import deepspeed

    from megagpt.model.build import build_model

    layout = {"parallel": ParallelConfig(), "groups": ProcessGroups(ParallelTopology(world_size))}
    for config in (CONFIG, LLAMA):
        for dtype in (torch.float32, torch.bfloat16):
            plain = build_model(
                config, seed=7, dtype=dtype, ds_config=ds_config(1, dtype), **layout
            )
            expected = dict(plain.named_parameters())
            for offload in (False, True):
                model = build_model(
                    config, seed=7, dtype=dtype, ds_config=ds_config(3, dtype, offload), **layout
                )
                parameters = dict(model.named_parameters())
                assert parameters.keys() == expected.keys()
                for name, parameter in parameters.items():
                    # 37 x 20 and 51 do not divide evenly: the last shard is padded
                    assert parameter.ds_tensor.numel() == -(-expected[name].numel() // world_size)
                    assert getattr(parameter, "tp_dim", None) == getattr(
                        expected[name], "tp_dim", None
                    )
                    with deepspeed.zero.GatheredParameters([parameter]):
                        assert parameter.dtype == dtype
                        assert torch.equal(parameter, expected[name]), name
                    assert parameter.numel() == 0  # given back


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages made under it that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = {}

    def _freed(self, reference):
        self.live -= self.known.pop(reference)

    def _count(self, value):
        if isinstance(value, torch.Tensor):
            reference = weakref.ref(value.untyped_storage(), self._freed)
            if reference not in self.known:
                self.known[reference] = value.untyped_storage().nbytes()
                self.live += self.known[reference]
                self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tree_map(self._count, result)
        return result


def measured_build(stage, dtype, groups):
    """Peak and final bytes of a construction."""
    from megagpt.model.build import build_model

    with LiveBytes() as meter:
        model = build_model(
            DEEP,
            seed=7,
            dtype=dtype,
            ds_config=ds_config(stage, dtype),
            parallel=ParallelConfig(),
            groups=groups,
        )
        held = meter.live
    del model
    return meter.peak, held


def memory_cells(rank, world_size):
    groups = ProcessGroups(ParallelTopology(world_size))
    return {
        dtype: (measured_build(1, dtype, groups), measured_build(3, dtype, groups))
        for dtype in (torch.float32, torch.bfloat16)
    }


def all_cells(rank, world_size):
    value_cells(rank, world_size)
    return memory_cells(rank, world_size)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_hold_the_plain_models_values_and_no_rank_more_than_one_layer_beside(world_size):
    with torch.device("meta"):
        model = GPTModel(DEEP)
    total = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.layers["0"].parameters())
    assert layer > model.embedding.word.weight.numel()
    for peaks in run_distributed(all_cells, world_size):
        for dtype, ((whole_peak, whole), (peak, held)) in peaks.items():
            # The meter sees a whole model where there is one, and the shard where it is sharded.
            assert whole_peak >= whole == total * dtype.itemsize
            assert total * dtype.itemsize / world_size <= held < whole / world_size + 64 * 1024
            # Values are drawn in float32, whatever the type of the weights.
            assert peak <= held + layer * 4
