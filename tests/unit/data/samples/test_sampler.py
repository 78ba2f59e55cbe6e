"""Every sample of a step goes to one rank, in an order that no layout changes."""

import pytest

from megagpt.data.samples.sampler import BatchSampler

LAYOUTS = [(1, 1), (2, 1), (1, 4), (2, 2), (3, 2), (12, 1)]


def samplers(micro, dp_size, global_batch_size=12):
    return [
        BatchSampler(
            global_batch_size=global_batch_size,
            micro_batch_size=micro,
            dp_rank=rank,
            dp_size=dp_size,
        )
        for rank in range(dp_size)
    ]


@pytest.mark.parametrize(("micro", "dp_size"), LAYOUTS)
def test_step_takes_the_next_global_batch_on_every_layout(micro, dp_size):
    ranks = [sampler.micro_batches(24) for sampler in samplers(micro, dp_size)]
    in_order = [index for row in zip(*ranks, strict=True) for part in row for index in part]
    assert in_order == list(range(24, 36))
    assert all(len(part) == micro for rank in ranks for part in rank)


def test_rank_and_micro_batch_take_the_documented_place():
    sampler = samplers(2, 3)[1]
    assert sampler.micro_batches(100) == [[102, 103], [108, 109]]


@pytest.mark.parametrize("count", [0, 1, 5, 8, 13])
@pytest.mark.parametrize(("micro", "dp_size"), LAYOUTS)
def test_evaluation_takes_each_sample_once_with_equal_work(micro, dp_size, count):
    ranks = [list(sampler.evaluation_batches(count)) for sampler in samplers(micro, dp_size)]
    assert len({len(rank) for rank in ranks}) == 1
    assert all(len(part) == micro for rank in ranks for part in rank)
    taken = sorted(i for rank in ranks for part in rank for i in part if i >= 0)
    assert taken == list(range(count))


def test_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=12 .* choose a multiple of 10"):
        samplers(5, 2)
