"""The process groups of the parallel axes; for the layers a degree of 1 has no group."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from megagpt.parallel.topology import ParallelTopology

Group = dist.ProcessGroup | None


def group_size(group: Group) -> int:
    """Ranks in the group; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: Group) -> int:
    """This rank's index in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def _own_group(rank: int, family: list[list[int]]) -> tuple[dist.ProcessGroup, list[int]]:
    """This rank's group of a family that divides the world, and its ranks; a collective."""
    own = next(ranks for ranks in family if rank in ranks)
    world = dist.group.WORLD
    assert world is not None
    if dist.get_backend() == "nccl" and world.bound_device_id is not None:
        # One split of the world's communicator for all of the family. There new_group splits it
        # too, on every rank of the world, once for each of as many groups as there may be ranks.
        group = dist.split_group(split_ranks=family)
        assert group is not None
        return group, own
    # Every rank creates every group, in the same order: new_group is collective over the world.
    groups = [dist.new_group(ranks) for ranks in family]
    return groups[family.index(own)], own


def limit_waiting(timeout: timedelta, *, exempt: dist.ProcessGroup) -> None:
    """Sets how long this rank waits in a collective, in all of its groups but one.

    Torch has no public name for it; what trains on it (torchtitan) takes this one.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not exempt:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


class ProcessGroups:
    """This rank's groups, which are also the `mpu` that DeepSpeed wants.

    DeepSpeed keeps the last `mpu` in a global and reads a group of None as the world, so it is
    handed one at every start, with real groups, of size 1 too. Under a pipeline it makes its own.

    Attributes:
        tp_group: The group that splits each layer; None at degree 1.
        dp_group: The group of ranks with the same weights; None at degree 1.
        replica_group: The ranks over which one whole model is split (pp x tp), size 1 too.

    Args:
        topology: Of the initialised default process group; every rank must construct this.
    """

    def __init__(self, topology: ParallelTopology) -> None:
        self.topology = topology
        self.rank = dist.get_rank()
        assert topology.world_size == dist.get_world_size()
        self.pp_rank, self.dp_rank, self.tp_rank = topology.coordinates(self.rank)
        self._tp, self._tp_ranks = _own_group(self.rank, topology.groups("tp"))
        self._dp, self._dp_ranks = _own_group(self.rank, topology.groups("dp"))
        self.replica_group = self._tp
        if topology.pipeline_parallel_size > 1:
            self.replica_group, _ = _own_group(self.rank, topology.groups("pp", "tp"))
        self.tp_group: Group = self._tp if topology.tensor_parallel_size > 1 else None
        self.dp_group: Group = self._dp if topology.data_parallel_size > 1 else None

    @property
    def has_loss(self) -> bool:
        """Whether this rank speaks for its samples: last stage, first tensor-parallel rank."""
        last = self.topology.pipeline_parallel_size - 1
        return self.tp_rank == 0 and self.pp_rank == last

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """DeepSpeed's name."""
        return self._dp

    def get_data_parallel_group_ranks(self) -> list[int]:
        """DeepSpeed's name."""
        return self._dp_ranks

    def get_data_parallel_world_size(self) -> int:
        """DeepSpeed's name."""
        return self.topology.data_parallel_size

    def get_data_parallel_rank(self) -> int:
        """DeepSpeed's name."""
        return self.dp_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """DeepSpeed's name."""
        return self._tp

    def get_tensor_model_parallel_world_size(self) -> int:
        """DeepSpeed's name."""
        return self.topology.tensor_parallel_size

    def get_tensor_model_parallel_rank(self) -> int:
        """DeepSpeed's name."""
        return self.tp_rank

    def get_tensor_model_parallel_src_rank(self) -> int:
        """DeepSpeed's name: the global rank of the group's first member."""
        return self._tp_ranks[0]

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_rank = get_tensor_model_parallel_rank
