"""DeepSpeed's faults that we mend are still there; when upstream mends one, its test fails.

Then our mending, and its line in docs/deepspeed.md, can go.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megagpt.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megagpt.operations.prebuild import async_io_problem
from megagpt.testing.distributed import run_distributed

CONFIG = ModelConfig(
    num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=8, vocab_size=37,
    vocab_padding_multiple=8,
)  # fmt: skip


def ds_config(stage, *, bf16=False, offload=None, micro_batches=2):
    zero = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": offload}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": micro_batches,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }


def pipeline_norm(world_size, *, mended):
    """Gradient norm of a step of a tied model under bf16, ZeRO-1, CPU offload, pp 2."""
    from megagpt.model.build import build_model
    from megagpt.parallel.groups import ProcessGroups
    from megagpt.parallel.topology import ParallelTopology
    from megagpt.training.batches import MicroBatch
    from megagpt.training.engine import build_engine
    from megagpt.training.train_step import train_step

    groups = ProcessGroups(ParallelTopology(world_size, pipeline_parallel_size=2))
    values = ds_config(1, bf16=True, offload="cpu")
    model = build_model(
        CONFIG,
        seed=1,
        dtype=torch.bfloat16,
        ds_config=values,
        parallel=ParallelConfig(pipeline_parallel_size=2),
        groups=groups,
    )
    engine = build_engine(model, OptimizerConfig(), values, groups)
    if not mended:
        del engine._INSTRUCTION_MAP  # the class's own
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(37, (2, 2, 9), generator=generator)
    batches = [MicroBatch(t[:, :-1].contiguous(), t[:, 1:].contiguous()) for t in tokens]
    return train_step(engine, batches, groups=groups, lr=1e-3).grad_norm


def loss_fn_weight_gradient(*, bf16):
    """What arrives at the optimizer of the gradient of a weight that is used in loss_fn.

    Under bf16 with ZeRO-1, or in fp32 with ZeRO-0, which shows that there is one.
    """
    import contextlib
    import io

    import deepspeed
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.runtime.pipe.module import PipelineModule

    class Pipeline(PipelineModule):
        def __init__(self):
            with contextlib.redirect_stdout(io.StringIO()):
                super().__init__(
                    layers=[torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)],
                    num_stages=2,
                    partition_method="uniform",
                    loss_fn=lambda y, _: (y @ self.head).sum(),
                )
            self.head = torch.nn.Parameter(torch.ones(4))

    torch.manual_seed(0)
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = Pipeline().to(dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=FusedAdam(model.parameters()),
        config=ds_config(int(bf16), bf16=bf16),
    )
    kept = []

    def keep():
        gradient = getattr(model.head, "_hp_grad", None) if bf16 else model.head.grad
        kept.append(0.0 if gradient is None else gradient.abs().sum().item())

    engine.optimizer.step = keep
    batch = (torch.ones(2, 4, dtype=dtype), torch.zeros(2))
    engine.train_batch(iter([batch, batch]))
    return kept[0]


def nvme_swapper(folder):
    """Type of a stand-in shard of an fp32 model, and whether a parameter can be asked for twice."""
    import deepspeed

    values = ds_config(3)
    values["zero_optimization"]["offload_param"] = {"device": "nvme", "nvme_path": folder}
    with deepspeed.zero.Init(config_dict_or_path=values):
        layer = torch.nn.Linear(1024, 1024)
    swapper = layer.weight.nvme_swapper
    with pytest.raises(AssertionError, match="already assigned swap buffer"):
        swapper.swap_in([layer.weight, layer.weight], async_op=False)
    return swapper.invalid_buffer.dtype


def secondary_copies():
    """Of zero_hpz_partition_size: whether a copy was cut already, and what a second model meets."""
    import deepspeed

    values = ds_config(3)
    values["zero_optimization"]["zero_hpz_partition_size"] = 2
    with deepspeed.zero.Init(config_dict_or_path=values):
        layer = torch.nn.Linear(64, 64)
    try:
        with deepspeed.zero.Init(config_dict_or_path=values):
            torch.nn.Linear(64, 64)
    except AssertionError as error:
        return layer.weight.ds_secondary_tensor is not None, str(error)
    return layer.weight.ds_secondary_tensor is not None, "nothing: it is built"


def least_loss_scale():
    """What an overflow at the least loss scale of fp16 is."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        1.0, scale_window=1000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False
    )
    try:
        scaler.update_scale(True)
    except Exception as error:  # of no class of its own
        return str(error)
    return "nothing: it goes on"


def granularity():
    """What the first backward pass of a model with leaves by granularity ends in."""
    from megagpt.model.build import build_model
    from megagpt.parallel.groups import ProcessGroups
    from megagpt.parallel.topology import ParallelTopology
    from megagpt.training.batches import MicroBatch
    from megagpt.training.engine import build_engine
    from megagpt.training.train_step import train_step

    groups = ProcessGroups(ParallelTopology(2))
    values = ds_config(3, micro_batches=1)
    values["zero_optimization"]["stage3_module_granularity_threshold"] = 20_000
    model = build_model(
        *(CONFIG,),
        seed=1,
        dtype=torch.float32,
        ds_config=values,
        parallel=ParallelConfig(),
        groups=groups,
    )
    engine = build_engine(model, OptimizerConfig(), values, groups)
    tokens = torch.randint(37, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    try:
        train_step(engine, [batch], groups=groups, lr=1e-3)
    except RuntimeError as error:
        return str(error)
    return "nothing: it trains"


def unknown_world():
    """The data-parallel size that a DeepSpeedConfig assumes before deepspeed.comm is there."""
    from deepspeed.runtime.config import DeepSpeedConfig

    return DeepSpeedConfig({"train_batch_size": 8}).world_size


def zero0(bf16):
    """The gradient norm that ZeRO-0 tells after a step."""
    import deepspeed
    from deepspeed.ops.adam import FusedAdam

    model = torch.nn.Linear(4, 4).to(torch.bfloat16 if bf16 else torch.float32)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=FusedAdam(model.parameters()),
        config=ds_config(0, bf16=bf16, micro_batches=1),
        dist_init_required=False,
    )
    engine.backward(engine(torch.ones(2, 4)).sum())
    engine.step()
    return engine.get_global_grad_norm()


def zero0_bf16_refusal():
    """What DeepSpeed says to bf16 weights with fp32 accumulation under ZeRO-0."""
    try:
        zero0(bf16=True)
    except NotImplementedError as error:
        return str(error)
    return "nothing: it trains"


def tied_marks():
    """Whether the last stage's copy of a tied module marks its other parameter as a copy too."""
    import contextlib
    import io

    from deepspeed.runtime.pipe.module import PipelineModule, TiedLayerSpec

    specs = [TiedLayerSpec("key", torch.nn.Linear, 4, 4) for _ in range(2)]
    with contextlib.redirect_stdout(io.StringIO()):
        model = PipelineModule(layers=specs, num_stages=2, partition_method="uniform")
    return model.tied_modules["key"].bias.ds_pipe_replicated


def engine_without_mpu():
    """What becomes of an engine that is handed no mpu after another was handed one."""
    try:
        zero0(bf16=False)
    except AttributeError as error:
        return str(error)
    return "nothing: it trains"


def cells(rank, world_size, folder):
    found = {"unknown world": unknown_world()}
    found["zero0 norm"] = zero0(bf16=False)
    found["zero0 bf16"] = zero0_bf16_refusal()
    found["tied, DeepSpeed's"] = pipeline_norm(world_size, mended=False)
    found["tied, ours"] = pipeline_norm(world_size, mended=True)
    found["loss_fn"] = loss_fn_weight_gradient(bf16=True)
    found["loss_fn, fp32"] = loss_fn_weight_gradient(bf16=False)
    found["tied marks"] = tied_marks()
    found["global mpu"] = engine_without_mpu()
    found["secondary"] = secondary_copies()
    found["least scale"] = least_loss_scale()
    found["granularity"] = granularity()
    if async_io_problem() is None:
        found["nvme"] = nvme_swapper(folder)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = run_distributed(cells, 2, str(tmp_path_factory.mktemp("swap")))
    return results[1]  # of the last stage


def test_deepspeeds_config_takes_the_world_for_one_rank_before_its_comm_is_there(found):
    assert found["unknown world"] == 1


def test_zero0_tells_no_gradient_norm(found):
    assert found["zero0 norm"] is None


def test_zero0_cannot_accumulate_bf16_in_fp32(found):
    assert "unsupported mix" in found["zero0 bf16"]


def test_tied_gradients_are_not_summed_under_offload(found):
    assert found["tied, DeepSpeed's"] != pytest.approx(found["tied, ours"], rel=1e-3)


def test_the_gradient_of_a_weight_in_loss_fn_is_lost_under_bf16_and_only_there(found):
    assert found["loss_fn"] == 0.0
    assert found["loss_fn, fp32"] > 0.1


def test_a_tied_module_is_marked_as_a_copy_as_a_whole(found):
    # Only `weight` is tied; the norm would leave `bias` out.
    assert found["tied marks"] is True


def test_the_last_mpu_stays_in_a_global_where_an_engine_without_one_trips_over_it(found):
    assert "get_model_parallel_rank" in found["global mpu"]


def test_a_second_copy_is_cut_before_there_are_weights_and_a_second_model_refused(found):
    is_there, message = found["secondary"]
    assert is_there and "already initialized" in message


def test_an_overflow_at_the_least_loss_scale_is_an_exception(found):
    assert "minimum" in found["least scale"]


def test_leaves_by_granularity_end_the_first_backward_pass(found):
    assert "broadcast" in found["granularity"]


def test_the_throughput_timer_waits_for_the_device_by_default():
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    timer = DeepSpeedThroughputTimerConfig()
    assert timer.enabled and timer.synchronized


def test_an_architecture_with_a_letter_cannot_be_read(monkeypatch):
    from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    with pytest.raises(ValueError, match="invalid literal for int"):
        FusedAdamBuilder().compute_capability_args()


def test_activations_of_a_pipeline_are_cut_over_tp_by_default():
    from deepspeed.runtime.config import DeepSpeedConfig

    pipeline = DeepSpeedConfig({"train_batch_size": 1}).pipeline
    assert pipeline["pipe_partitioned"] and pipeline["grad_partitioned"]


def test_the_nvme_swapper_stands_in_with_float16(found, async_io):
    assert found["nvme"] == torch.float16


def test_zero_init_ignores_the_type_where_fp16_is_not_supported(monkeypatch):
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    init = InsertPostInitMethodToModuleSubClasses(enabled=False, dtype=torch.float32)
    assert init.dtype == torch.bfloat16


def copies_of(function):
    """Names of the operations that converted a tensor or put several together."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.name() in ("aten::_to_copy", "aten::cat"):
                self.seen.append(func.name())
            return result

    with Copies() as copies:
        function()
    return copies.seen


def test_bf16_gradients_are_copied_whole_before_they_are_added():
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    weight = torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    weight.grad = torch.ones(8, dtype=torch.bfloat16)
    optimizer = SimpleNamespace(
        autoep_folding_tp_group=None,
        fp32_groups_gradients=[[torch.zeros(8)]],
        fp32_groups_has_gradients=[[False]],
    )
    made = copies_of(lambda: BF16_Optimizer._update_hp_grad(optimizer, weight, 0, 0, False))
    assert made == ["aten::_to_copy"]
    assert optimizer.fp32_groups_gradients[0][0].tolist() == [1.0] * 8


def test_flat_sums_of_two_groups_are_copied_together_to_be_reduced():
    from deepspeed.runtime.engine import DeepSpeedEngine

    reduced = []
    engine = SimpleNamespace(allreduce_and_copy=lambda bucket, *_: reduced.append(len(bucket)))
    sums = [torch.zeros(8), torch.zeros(8)]
    DeepSpeedEngine.allreduce_no_retain(engine, sums, None)
    assert reduced == [2], "one bucket, which is flattened"
    reduced.clear()
    DeepSpeedEngine.allreduce_no_retain(engine, sums, None, numel_per_bucket=0)
    assert reduced == [1, 1], "what we ask for: one tensor is no copy"


def test_every_fault_is_written_down():
    page = (Path(__file__).resolve().parents[2] / "docs/deepspeed.md").read_text()
    for words in (
        "takes the world for one rank", "`get_global_grad_norm()` is None", "unsupported mix",
        "`.grad_accum`", "`clear_lp_grads`", "float16", "`zero.Init(dtype=...)`",
        "zero_hpz_partition_size", "least fp16 loss scale", "`stage3_module_granularity_threshold`",
        "`ThroughputTimer`", "TORCH_CUDA_ARCH_LIST=9.0a", "`BF16_Optimizer` (ZeRO-1, bf16)",
    ):  # fmt: skip
        assert words in page, words
