"""The same samples reach the step on any number of ranks, read ahead or not, resumed or not."""

import numpy as np
import pytest
import torch

from megagpt.config.command_line import parse_config
from megagpt.data.datasets import build_datasets
from megagpt.data.samples.gpt_dataset import PAD
from megagpt.data.samples.masks import IGNORE_INDEX
from megagpt.data.samples.sampler import BatchSampler
from megagpt.testing.corpus import byte_corpus
from megagpt.training.batches import Batches

GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pairs")
    prefix = byte_corpus(directory, [f"document {i} of some words" for i in range(30)])
    arguments = [
        *("--data.path", str(prefix), "--data.split", "8,2"),
        *("--model.seq_length", "16", "--batch.global_batch_size", str(GLOBAL_BATCH)),
        *("--batch.micro_batch_size", "2", "--training.train_steps", "20"),
        *("--data.document_masking", "true"),
    ]
    return parse_config(arguments)[0]


def build(config, *, dp_rank=0, dp_size=1):
    datasets = build_datasets(config.data, seq_length=16, seed=config.training.seed)
    sampler = BatchSampler(
        global_batch_size=GLOBAL_BATCH, micro_batch_size=2, dp_rank=dp_rank, dp_size=dp_size
    )
    return Batches(
        datasets, sampler, config.training, config.data, end_of_document=256, has_dropout=False
    )


def rows_of(ranks, step):
    """Token rows of a global batch in its order: micro-batches go round the ranks."""
    consumed = (step - 1) * GLOBAL_BATCH
    by_rank = [batches.training(consumed, step=step) for batches in ranks]
    return [
        row for together in zip(*by_rank, strict=True) for each in together for row in each.tokens
    ]


def test_pairs_are_counted_within_documents(config):
    batches = build(config)
    for batch in batches.training(0, step=1):
        pairs = 0
        for row in batch.tokens.tolist():
            begin = 0
            for place, token in enumerate(row):
                pairs += place - begin + 1
                if token == 256:
                    begin = place + 1
        assert batch.num_pairs == pairs
        assert batch._replace(position_ids=None).num_pairs == 2 * 16 * 17 // 2


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_step_has_the_same_samples_on_any_number_of_ranks_and_after_a_resume(config, dp_size):
    # 44 samples an epoch: the sixth step crosses into the second.
    ranks = [build(config, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    dataset = ranks[0].datasets["train"]
    seen = {step: torch.stack(rows_of(ranks, step)) for step in range(1, 13)}
    for step, tokens in seen.items():
        wanted = dataset.gather(range((step - 1) * GLOBAL_BATCH, step * GLOBAL_BATCH))
        assert tokens.tolist() == wanted[:, :-1].tolist()
    resumed = [build(config, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for step in (7, 8):
        assert torch.equal(torch.stack(rows_of(resumed, step)), seen[step])
    for batches in (*ranks, *resumed):
        batches.close()


def test_labels_follow_tokens_and_positions_begin_again_at_documents(config):
    batches = build(config)
    for batch in batches.training(0, step=1):
        assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
        begins = torch.ones_like(batch.tokens, dtype=torch.bool)
        begins[:, 1:] = batch.tokens[:, :-1] == batches.end_of_document
        assert torch.equal(batch.position_ids == 0, begins)
        assert batch.tokens.is_contiguous() and batch.labels.is_contiguous()
    batches.close()


def test_evaluation_scores_each_token_once_over_all_ranks(config):
    scored = 0
    for rank in range(4):
        batches = build(config, dp_rank=rank, dp_size=4)
        valid = batches.datasets["valid"]
        scored += sum(batch.num_tokens for batch in batches.evaluation("valid"))
        batches.close()
    samples = valid.gather(range(len(valid)))
    assert scored == int(np.sum(samples[:, 1:] != PAD)) == valid.num_tokens - 1
    assert IGNORE_INDEX != PAD


def test_what_goes_wrong_while_reading_ahead_is_raised_by_the_step_that_needs_it(config):
    batches = build(config)
    dataset = batches.datasets["train"]
    real = dataset.gather

    def fail_at_the_third_step(indices, out=None):
        if min(indices) >= 2 * GLOBAL_BATCH:
            raise ValueError("a.bin is damaged")
        return real(indices, out)

    dataset.gather = fail_at_the_third_step
    batches.training(0, step=1)
    batches.training(GLOBAL_BATCH, step=2)
    with pytest.raises(ValueError, match=r"a\.bin is damaged"):
        batches.training(2 * GLOBAL_BATCH, step=3)
    batches.close()


def test_nothing_is_read_past_the_last_step(config):
    batches = build(config)
    batches.training(19 * GLOBAL_BATCH, step=20)
    assert batches._ahead is None
    batches.close()


def test_the_tokens_of_the_next_step_are_known_before_it(config):
    batches = build(config)
    assert batches.num_tokens_ahead() == 0
    for step in range(1, 21):
        batches.training((step - 1) * GLOBAL_BATCH, step=step)
        assert batches.num_tokens_ahead() == (0 if step == 20 else GLOBAL_BATCH * 16)


def test_a_read_that_fails_is_told_by_the_step_that_takes_it(config, monkeypatch):
    batches = build(config)
    batches.training(0, step=1)
    batches.num_tokens_ahead()
    monkeypatch.setattr(batches, "_read_step", lambda *_: 1 / 0)
    batches.training(GLOBAL_BATCH, step=2)
    assert batches.num_tokens_ahead() == 0
    with pytest.raises(ZeroDivisionError):
        batches.training(2 * GLOBAL_BATCH, step=3)
