"""Rank <-> coordinates, against DeepSpeed's own topology."""

import pytest
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.parallel.topology import ParallelTopology

degree = st.integers(1, 5)


@settings(deadline=None)
@given(pp=degree, dp=degree, tp=degree)
def test_coordinates_and_groups_agree_with_deepspeeds_topology(pp, dp, tp):
    ours = ParallelTopology(pp * dp * tp, tensor_parallel_size=tp, pipeline_parallel_size=pp)
    theirs = PipeModelDataParallelTopology(num_pp=pp, num_mp=tp, num_dp=dp)
    assert ours.data_parallel_size == dp
    for rank in range(ours.world_size):
        p, d, t = ours.coordinates(rank)
        assert theirs.get_coord(rank) == (p, d, t)
    for groups, size, axis in (
        (ours.groups("tp"), tp, "model"),
        (ours.groups("dp"), dp, "data"),
    ):
        assert all(len(group) == size for group in groups)
        assert sorted(sum(groups, [])) == list(range(ours.world_size))
        if size > 1:
            assert sorted(groups) == sorted(theirs.get_axis_comm_lists(axis))


def test_a_world_that_the_degrees_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="world size 6 .* tensor_parallel_size=4"):
        ParallelTopology(6, tensor_parallel_size=4)
