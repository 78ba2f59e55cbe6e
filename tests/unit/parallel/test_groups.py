"""Process groups are made by as few calls as the back end allows; counted on a stand-in."""

from types import SimpleNamespace

import pytest

from megagpt.parallel import groups
from megagpt.parallel.groups import ProcessGroups
from megagpt.parallel.topology import ParallelTopology

AXES = (("dp",), ("tp",), ("pp", "tp"))


class RecordingDist:
    """Stands for torch.distributed in a world of any size, seen from one rank."""

    def __init__(self, rank, world_size, *, backend, is_bound=True):
        self.calls = []
        self.get_rank = lambda group=None: rank
        self.get_world_size = lambda group=None: world_size
        self.get_backend = lambda: backend
        world = SimpleNamespace(bound_device_id="cuda:0" if is_bound else None)
        self.group = SimpleNamespace(WORLD=world)

    def new_group(self, ranks):
        self.calls.append(("new", ranks))
        return tuple(ranks)

    def split_group(self, split_ranks):
        self.calls.append(("split", split_ranks))
        return tuple(next(ranks for ranks in split_ranks if self.get_rank() in ranks))


def made(monkeypatch, topology, rank, **options):
    stand_in = RecordingDist(rank, topology.world_size, **options)
    monkeypatch.setattr(groups, "dist", stand_in)
    return ProcessGroups(topology), stand_in.calls


@pytest.mark.parametrize("world_size", [8, 1024, 4096])
@pytest.mark.parametrize(("tp", "pp", "families"), [(1, 1, 2), (8, 1, 2), (2, 4, 3)])
def test_under_nccl_a_family_is_one_split(monkeypatch, world_size, tp, pp, families):
    topology = ParallelTopology(world_size, tp, pp)
    rank = world_size - 3
    made_groups, calls = made(monkeypatch, topology, rank, backend="nccl")
    assert [kind for kind, _ in calls] == ["split"] * families
    for _, split in calls:
        assert sorted(r for ranks in split for r in ranks) == list(range(world_size))
    own = {axes: next(g for g in topology.groups(*axes) if rank in g) for axes in AXES}
    assert made_groups.get_data_parallel_group() == tuple(own["dp",])
    assert made_groups.get_tensor_model_parallel_group() == tuple(own["tp",])
    assert made_groups.replica_group == tuple(own["pp", "tp"])


@pytest.mark.parametrize("options", [{"backend": "gloo"}, {"backend": "nccl", "is_bound": False}])
def test_without_a_bound_device_each_group_is_made(monkeypatch, options):
    topology = ParallelTopology(8, 2, 2)
    made_groups, calls = made(monkeypatch, topology, 5, **options)
    assert calls == [("new", ranks) for axes in (AXES[1], AXES[0], AXES[2])
                     for ranks in topology.groups(*axes)]  # fmt: skip
    assert 5 in made_groups.replica_group and len(made_groups.replica_group) == 4
    assert 5 in made_groups.get_data_parallel_group()
