"""What ranks learn of each other, by as little as goes over the wire; and how long they wait."""

from datetime import timedelta

import torch
import torch.distributed as dist

from megagpt.checkpoint.agreement import Agreement
from megagpt.parallel.groups import ProcessGroups, limit_waiting
from megagpt.parallel.topology import ParallelTopology
from megagpt.testing.distributed import run_distributed


def agree(rank, world_size):
    """Every method's result, and how many objects were gathered."""
    agreement = Agreement(timedelta(minutes=1))
    gathered = []
    gather = dist.all_gather_object

    def counted(*arguments, **options):
        gathered.append(1)
        return gather(*arguments, **options)

    dist.all_gather_object = counted
    try:
        none = agreement.failures(None), agreement.first("")
        after_none = len(gathered)
        some = agreement.failures(None if rank == 0 else f"of {rank}")
        first = agreement.first("" if rank < 1 else f"p{rank}")
    finally:
        dist.all_gather_object = gather
    told = agreement.of_rank_0({"rank": rank}), agreement.gather(rank)
    agreement.close()
    return none, after_none, some, first, told


def test_what_all_ranks_learn_is_the_same_and_nothing_is_gathered_without_need():
    outcomes = run_distributed(agree, 3)
    for rank, (none, after_none, some, first, (told, gathered)) in enumerate(outcomes):
        assert none == ({}, "") and after_none == 0
        assert some == {1: "of 1", 2: "of 2"} and first == "rank 1: p1"
        assert told == {"rank": 0}
        assert gathered == ([0, 1, 2] if rank == 0 else None)


def timeouts(rank, world_size):
    groups = ProcessGroups(ParallelTopology(world_size, 2))
    agreement = Agreement(timedelta(minutes=7))
    limit_waiting(timedelta(minutes=3), exempt=agreement.group)
    each = (dist.group.WORLD, groups.get_tensor_model_parallel_group(), agreement.group)
    return [g._get_backend(torch.device("cpu")).options._timeout for g in each]


def test_collectives_wait_as_long_as_they_are_told_and_storage_longer():
    for found in run_distributed(timeouts, 2):
        assert found == [timedelta(minutes=minutes) for minutes in (3, 3, 7)]
