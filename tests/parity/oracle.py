"""The oracle: one process, plain torch, no DeepSpeed, and a loop of its own, in fp64 or fp32.

Of megagpt it takes the model (which equals transformers' GPT-2 and Llama, see tests/unit/model),
its initial weights, the order of the data, and the mask that a dropout key means. Batches, masks,
loss, accumulation, schedule, clipping and optimizer are written here a second time.
"""

import math

import torch

from megagpt.data.datasets import build_datasets
from megagpt.data.indexed.manifest import read_manifest
from megagpt.model.dropout import dropout_keys
from megagpt.model.gpt import GPTModel
from megagpt.model.initialization import initialize


def batch_of(config, dataset, eod, indices, step):
    """Tensors of samples; token by token, as the definitions read."""
    samples = torch.tensor([dataset[i].tolist() for i in indices])
    tokens, labels = samples[:, :-1].clone(), samples[:, 1:].clone()
    positions = torch.zeros_like(tokens)
    for row in range(len(tokens)):
        for place in range(tokens.shape[1]):
            if place and tokens[row, place - 1] != eod:
                positions[row, place] = positions[row, place - 1] + 1
            if labels[row, place] == -1 or (
                config.data.eod_mask_loss and tokens[row, place] == eod
            ):
                labels[row, place] = -100
    tokens[tokens == -1] = 0
    keys = dropout_keys(torch.tensor(indices), seed=config.training.seed, step=step)
    return (
        tokens,
        labels,
        positions if config.data.document_masking else None,
        keys if config.model.dropout else None,
    )


def inner_orders(config, number):
    """Orders of heads and inner units in which a block computes the same, its sums apart."""
    generator = torch.Generator().manual_seed(number)
    size, groups = config.head_size, torch.randperm(config.kv_heads, generator=generator)
    per_group = config.num_attention_heads // config.kv_heads
    heads = (groups[:, None] * per_group + torch.arange(per_group)).flatten()
    queries, keys = ((h[:, None] * size + torch.arange(size)).flatten() for h in (heads, groups))
    units = torch.randperm(config.ffn_size, generator=generator)
    return {
        "attention.query": queries,
        "attention.key": keys,
        "attention.value": keys,
        "attention.output": queries,
        "mlp.up": units,
        "mlp.gate": units,
        "mlp.down": units,
    }


@torch.no_grad()
def reorder(weights, orders):
    """Puts the rows of what enters heads and inner units, and the columns of what leaves them."""
    for name, weight in weights:
        part = ".".join(name.split(".")[2:4])
        dim = 1 if part in ("attention.output", "mlp.down") else 0
        if part in orders and dim < weight.dim():
            weight.copy_(weight.index_select(dim, orders[part].to(weight.device)))


def in_pieces(tensor, count):
    """A batch's tensor in so many pieces; None is None in each."""
    return [None] * count if tensor is None else tensor.chunk(count)


def learning_rate(config, step):
    """Linear warm-up, then a cosine to min_lr."""
    lr, low, warmup = config.optimizer.lr, config.optimizer.min_lr, config.optimizer.warmup_steps
    if step <= warmup:
        return lr * step / warmup
    share = (step - warmup) / (config.training.train_steps - warmup)
    return low + (lr - low) * (1 + math.cos(math.pi * share)) / 2


def train(config, dtype, *, device="cpu", order=0):
    """Trains the whole run.

    Args:
        config: Of the run.
        dtype: Of weights, activations and optimizer. In float64 it is the truth; in float32 it
            shows what honest rounding does.
        device: On which it computes.
        order: 0 takes everything as it stands; with any other number the heads, the inner units of
            the MLP and the samples of a step stand in another order, and the samples come in
            pieces: the same model to the last real digit, every sum in another order.

    Returns:
        (loss, gradient norm, tokens) of each step, the validation loss at the end, final weights.
    """
    torch.manual_seed(0)
    datasets = build_datasets(
        config.data, seq_length=config.model.seq_length, seed=config.training.seed
    )
    eod = read_manifest(config.data.path).eod
    model = GPTModel(config.model).to(device, dtype)
    initialize(model, config.model, seed=config.training.seed)
    orders = inner_orders(config.model, order) if order else {}
    reorder(model.named_parameters(), orders)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )
    curve, size = [], config.batch.global_batch_size
    generator = torch.Generator().manual_seed(order)
    for step in range(1, config.training.train_steps + 1):
        indices = torch.arange((step - 1) * size, step * size)
        if order:
            indices = indices[torch.randperm(size, generator=generator)]
        batch = batch_of(config, datasets["train"], eod, indices.tolist(), step)
        batch = [None if tensor is None else tensor.to(device) for tensor in batch]
        count = int((batch[1] != -100).sum())
        optimizer.zero_grad()
        loss = 0.0
        for piece in zip(*(in_pieces(tensor, 1 + order % 4) for tensor in batch), strict=True):
            part = model(*piece).sum() / count
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        curve.append((loss, norm.item(), count))
    model.eval()
    total, count, valid = 0.0, 0, datasets["valid"]
    with torch.no_grad():
        for index in range(len(valid)):
            batch = batch_of(config, valid, eod, [index], 0)
            batch = [None if tensor is None else tensor.to(device) for tensor in batch]
            total += model(*batch).sum(dtype=torch.float64).item()
            count += int((batch[1] != -100).sum())
    reorder(model.named_parameters(), {part: o.argsort() for part, o in orders.items()})
    weights = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
    return curve, total / count, weights
