"""The whole model on tp 2 and 4: loss and every gradient equal one rank's."""

import torch
import torch.distributed as dist

from megagpt.config.schema import ModelConfig
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initialize
from megagpt.model.loss import IGNORE_INDEX
from megagpt.testing.distributed import run_distributed

SHAPE = dict(
    num_layers=2, hidden_size=32, num_attention_heads=8, seq_length=9, vocab_size=37,
    vocab_padding_multiple=4, init_std=0.3,
)  # fmt: skip
CONFIGS = {
    "gpt2": ModelConfig(**SHAPE, qk_norm=True),
    "llama": ModelConfig(
        **SHAPE,
        num_kv_heads=4,
        ffn_hidden_size=40,
        normalization="rmsnorm",
        position_embedding="rope",
        activation="swiglu",
        bias=False,
        qk_norm=True,
        tie_embeddings=False,
    ),  # fmt: skip
}


def loss_and_gradients(config, group):
    """Loss, and the gradients gathered over tp, without the padding of the vocabulary."""
    model = GPTModel(config, tp_group=group)
    initialize(model, config, seed=5, tp_group=group)
    with torch.no_grad():  # zeros and ones would hide faults; the same on every rank
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1 and not hasattr(parameter, "tp_dim"):
                parameter.normal_(generator=generator)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(37, (2, 9), generator=generator)
    labels = torch.randint(37, (2, 9), generator=generator)
    labels[1, 3] = IGNORE_INDEX
    loss = model(tokens, labels)
    (loss * torch.rand(2, 9, generator=generator)).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
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
    return loss.detach(), gradients


def cells(rank, world_size):
    groups = {4: dist.new_group([0, 1, 2, 3])}
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups[2] = pairs[rank // 2]
    for name, config in CONFIGS.items():
        expected_loss, expected = loss_and_gradients(config, None)
        # A key norm's bias has gradient 0 but for rounding, which the largest gradient measures.
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        for tp, group in groups.items():
            loss, gradients = loss_and_gradients(config, group)
            # fp32 sums in another order, through two layers
            torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
            assert gradients.keys() == expected.keys()
            for key, gradient in gradients.items():
                torch.testing.assert_close(
                    gradient,
                    expected[key],
                    rtol=1e-4,
                    atol=1e-5 * expected[key].abs().max().item() + 1e-7 * largest,
                    msg=lambda m, at=f"{name} tp={tp} {key}: ": at + m,
                )
    return True


def test_loss_and_every_gradient_are_the_same_on_one_two_and_four_ranks():
    assert run_distributed(cells, 4) == [True] * 4
