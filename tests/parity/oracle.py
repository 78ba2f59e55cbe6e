"""The oracle: one process, fp32, plain torch, no DeepSpeed, and a loop of its own.

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


def learning_rate(config, step):
    """Linear warm-up, then a cosine to min_lr."""
    lr, low, warmup = config.optimizer.lr, config.optimizer.min_lr, config.optimizer.warmup_steps
    if step <= warmup:
        return lr * step / warmup
    share = (step - warmup) / (config.training.train_steps - warmup)
    return low + (lr - low) * (1 + math.cos(math.pi * share)) / 2


def train(config):
    """Trains the whole run.

    Returns:
        (loss, gradient norm, tokens) of each step, the validation loss at the end, final weights.
    """
    torch.manual_seed(0)
    datasets = build_datasets(
        config.data, seq_length=config.model.seq_length, seed=config.training.seed
    )
    eod = read_manifest(config.data.path).eod
    model = GPTModel(config.model)
    initialize(model, config.model, seed=config.training.seed)
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
    for step in range(1, config.training.train_steps + 1):
        indices = range((step - 1) * size, step * size)
        batch = batch_of(config, datasets["train"], eod, list(indices), step)
        count = int((batch[1] != -100).sum())
        loss = model(*batch).sum() / count
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        curve.append((loss.item(), norm.item(), count))
    model.eval()
    total, count, valid = 0.0, 0, datasets["valid"]
    with torch.no_grad():
        for index in range(len(valid)):
            batch = batch_of(config, valid, eod, [index], 0)
            total += model(*batch).sum(dtype=torch.float64).item()
            count += int((batch[1] != -100).sum())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return curve, total / count, weights
