"""The whole model, and a block alone, on tp 2 and 4: every gradient equals one rank's."""

import torch
import torch.distributed as dist

from megagpt.config.schema import ModelConfig
from megagpt.data.samples.masks import IGNORE_INDEX
from megagpt.model.dropout import dropout_keys
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initialize
from megagpt.model.layers import TensorParallel
from megagpt.testing.distributed import run_distributed

SHAPE = dict(
    num_layers=2, hidden_size=32, num_attention_heads=8, seq_length=8, vocab_size=37,
    vocab_padding_multiple=4, init_std=0.3,
)  # fmt: skip
CONFIGS = {
    "gpt2": ModelConfig(**SHAPE, qk_norm=True, dropout=0.1),
    "llama": ModelConfig(
        **SHAPE,
        num_kv_heads=2,  # two ranks of four share one
        ffn_hidden_size=40,
        normalization="rmsnorm",
        position_embedding="rope",
        activation="swiglu",
        bias=False,
        qk_norm=True,
        tie_embeddings=False,
        dropout=0.1,
    ),  # fmt: skip
}


def build(config, group, *, sequence_parallel=False, recompute="none"):
    # In float64, so that what differs is no rounding: a key norm's bias has gradient 0.
    model = GPTModel(config, TensorParallel(group, sequence_parallel), recompute=recompute).double()
    initialize(model, config, seed=5, tp_group=group)
    with torch.no_grad():  # zeros and ones would hide faults; the same on every rank
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1 and not hasattr(parameter, "tp_dim"):
                parameter.normal_(generator=generator)
    return model


def gathered_gradients(module, group):
    """Gradients gathered over tp, without the padding of the vocabulary."""
    gradients = {}
    for name, parameter in module.named_parameters():
        gradient, dim = parameter.grad, getattr(parameter, "tp_dim", None)
        if group is not None:
            parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, gradient.contiguous(), group=group)
            if dim is None:
                for part in parts:  # replicated: every rank must hold the whole gradient
                    assert torch.equal(part, gradient), name
            else:
                gradient = torch.cat(parts, dim=dim)
        if name in ("embedding.word.weight", "lm_head.weight"):
            assert (gradient[37:] == 0).all()
            gradient = gradient[:37]
        gradients[name] = gradient
    return gradients


def loss_and_gradients(config, group, **arguments):
    model = build(config, group, **arguments)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(37, (2, 8), generator=generator)
    labels = torch.randint(37, (2, 8), generator=generator)
    labels[1, 3] = IGNORE_INDEX
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], list(range(8))])
    loss = model(tokens, labels, positions, dropout_keys(torch.arange(2), seed=1, step=1))
    (loss * torch.rand(2, 8, generator=generator).double()).sum().backward()
    return loss.detach(), gathered_gradients(model, group)


def block_output_and_gradients(config, group, sequence_parallel):
    """One block gathered over the group: output, gradient of the input, gradients."""
    model = build(config, group, sequence_parallel=sequence_parallel)
    block = model.layers["1"]
    generator = torch.Generator().manual_seed(3)
    x, upstream = (torch.randn(2, 8, 32, generator=generator).double() for _ in range(2))
    keys = dropout_keys(torch.arange(2), seed=1, step=1)
    context = model.context(8, x.device, dropout_keys=keys)
    split = sequence_parallel and group is not None
    if split:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        x, upstream = (t.chunk(size, dim=1)[rank] for t in (x, upstream))
    x = x.clone().requires_grad_()
    y = block(x, context)
    y.backward(upstream.contiguous())
    pair = [y.detach(), x.grad]
    if split:
        whole = []
        for tensor in pair:
            parts = [torch.empty_like(tensor) for _ in range(size)]
            dist.all_gather(parts, tensor.contiguous(), group=group)
            whole.append(torch.cat(parts, dim=1))
        pair = whole
    return {"output": pair[0], "input": pair[1]} | gathered_gradients(block, group)


def assert_close(actual, expected, where):
    largest = max(tensor.abs().max().item() for tensor in expected.values())
    assert actual.keys() == expected.keys()
    for key, tensor in actual.items():
        torch.testing.assert_close(
            tensor,
            expected[key],
            rtol=1e-10,
            atol=1e-12 * largest,
            msg=lambda m, at=f"{where} {key}: ": at + m,
        )


def cells(rank, world_size):
    groups = {4: dist.new_group([0, 1, 2, 3])}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups[2] = pairs[rank // 2]
    for name, config in CONFIGS.items():
        expected_loss, expected = loss_and_gradients(config, None)
        expected_block = block_output_and_gradients(config, None, False)
        for tp, group in groups.items():
            for sequence_parallel in (False, True):
                for recompute in ("none", "full", "selective"):
                    loss, gradients = loss_and_gradients(
                        config,
                        group,
                        sequence_parallel=sequence_parallel,
                        recompute=recompute,
                    )
                    where = f"{name} tp={tp} sp={sequence_parallel} recompute={recompute}"
                    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
                    assert_close(gradients, expected, where)
                block = block_output_and_gradients(config, group, sequence_parallel)
                assert_close(block, expected_block, f"block {name} tp={tp} sp={sequence_parallel}")
    return True


def test_loss_and_every_gradient_are_the_same_on_one_two_and_four_ranks():
    assert run_distributed(cells, 4) == [True] * 4
