"""The whole model on fake CUDA tensors: every style, feature, precision and recomputation.

Next file: `live_bytes.py`, which counts bytes in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
from fake_device import DeviceOnly, HostTraffic, fake_cuda
from torch.testing._internal.distributed.fake_pg import FakeStore

from megagpt.config.schema import ModelConfig, ParallelConfig, Recompute
from megagpt.inference.generate import Sampling, generate
from megagpt.kernels.registry import Kernels
from megagpt.model.attention import KVCache
from megagpt.model.build import build_model
from megagpt.model.dropout import dropout_keys
from megagpt.model.gpt import GPTModel
from megagpt.model.layers import ONE_RANK, TensorParallel

GPT2 = ModelConfig(
    num_layers=1, hidden_size=128, num_attention_heads=8, seq_length=64, vocab_size=1000
)
LLAMA = replace(
    GPT2,
    num_kv_heads=4,
    normalization="rmsnorm",
    position_embedding="rope",
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
STYLES = {
    "gpt2": GPT2,
    "gpt2_grouped_untied": replace(GPT2, num_kv_heads=2, tie_embeddings=False),
    "llama_grouped": LLAMA,
    "llama_tied": replace(LLAMA, num_kv_heads=None, tie_embeddings=True),
}


@dataclass(frozen=True)
class Case:
    """One way to train."""

    style: str
    dtype: torch.dtype = torch.bfloat16
    recompute: Recompute = "none"
    masked: bool = False
    dropout: bool = False
    qk_norm: bool = False
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return replace(
            STYLES[self.style], dropout=0.1 if self.dropout else 0.0, qk_norm=self.qk_norm
        )

    def __str__(self) -> str:
        words = [self.style, str(self.dtype)[6:], self.recompute]
        flags = ("masked", "dropout", "qk_norm", "sequence_parallel")
        words += [flag for flag in flags if getattr(self, flag)]
        return "-".join([*words, f"tp{self.tensor_parallel_size}"])


def build(config: ModelConfig, dtype: torch.dtype, tp: TensorParallel, recompute: Recompute):
    """A model on the device, its weights of a type from the first (`to` cannot swap fake ones)."""
    try:
        torch.set_default_dtype(dtype)
        device = torch.device("cuda")
        kernels = Kernels("auto", device=device, dtype=dtype)
        with device:
            return GPTModel(config, tp, recompute=recompute, kernels=kernels)
    finally:
        torch.set_default_dtype(torch.float32)


def tensor_parallel(size: int, *, sequence_parallel: bool = False) -> TensorParallel:
    """Of rank 0 of a world of torch's fake ranks, whose collectives do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if size == 1:
        return ONE_RANK
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    return TensorParallel(dist.group.WORLD, sequence_parallel)


def batch(config: ModelConfig, size: int, *, masked: bool) -> list[torch.Tensor | None]:
    """The arguments of `GPTModel.forward`, made on the host and moved, as training does."""
    tokens = torch.zeros(size, config.seq_length, dtype=torch.int64)
    keys = dropout_keys(torch.arange(size), seed=1, step=1) if config.dropout else None
    # Documents of one token each, and as many as that.
    offsets = torch.arange(tokens.numel() + 1, dtype=torch.int32) if masked else None
    arguments = [tokens, tokens, tokens if masked else None, keys, offsets]
    return [None if t is None else t.to("cuda", non_blocking=True) for t in arguments]


def attention_of_training(
    case: Case, damage: Callable[[GPTModel], None] = lambda model: None
) -> set[str]:
    """Trains one micro-batch under `DeviceOnly`; returns the attention kernels that it took.

    `damage` does something to the model first, for tests of the checker itself.
    """
    config = case.config
    tp = tensor_parallel(case.tensor_parallel_size, sequence_parallel=case.sequence_parallel)
    with fake_cuda():
        model = build(config, case.dtype, tp, case.recompute)
        damage(model)
        arguments = batch(config, 2, masked=case.masked)
        with DeviceOnly() as watch:
            loss = model(*arguments)
            (loss.sum() * 0.01).backward()
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.device.type == "cuda", name
    return attention_kernels(watch)


def build_for_training(style: str, dtype: torch.dtype) -> set[str]:
    """Builds and fills a model as ZeRO 0 to 2 do; returns where and of what type its weights are.

    Under `DeviceOnly`: no weight is made in host memory and moved.
    """
    with fake_cuda(), DeviceOnly():
        model = build_model(
            STYLES[style],
            seed=1,
            dtype=dtype,
            ds_config={"zero_optimization": {"stage": 2}},
            parallel=ParallelConfig(),
            groups=SimpleNamespace(tp_group=None),
            device=torch.device("cuda", 0),
        )
    return {f"{weight.device.type} {weight.dtype}" for weight in model.parameters()}


def attention_of_inference(style: str, dtype: torch.dtype) -> set[str]:
    """Logits with and without a KV cache under `DeviceOnly`; returns the attention kernels."""
    config = STYLES[style]
    with fake_cuda(), torch.no_grad():
        model = build(config, dtype, ONE_RANK, "none").eval()
        prompt = torch.zeros(2, 8, dtype=torch.int64, device="cuda")
        with DeviceOnly() as watch:
            cache = KVCache(config.num_layers)
            for tokens in (prompt, prompt[:, :1], prompt[:, :1]):
                model.logits(tokens, cache)
            logits = model.logits(prompt)
    assert logits.device.type == "cuda" and logits.dtype == torch.float32
    return attention_kernels(watch)


def traffic_of_generation(sampling: Sampling) -> list[tuple[str, tuple[int, ...]]]:
    """What goes between host and device while 2 samples of 3 tokens are drawn."""
    with fake_cuda():
        model = build(LLAMA, torch.float32, ONE_RANK, "none").eval()
        with HostTraffic() as watch:
            generate(model, [1, 2], max_new_tokens=3, sampling=sampling, eod=999, num_samples=2)
    return watch.moves


def attention_kernels(watch: DeviceOnly) -> set[str]:
    """Which forward kernels of attention were called; no name: the math kernel."""
    prefix = "aten::_scaled_dot_product_"
    names = {name.removeprefix(prefix) for name in watch.seen if name.startswith(prefix)}
    if "torch_attn::_varlen_attn" in watch.seen:
        names.add("varlen")
    return {name.removesuffix("_attention") for name in names if "backward" not in name}
