"""The cut of blocks into stages: as even as any cut can be, by what weighs."""

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.schema import ModelConfig
from megagpt.parallel.partition import _even_cuts, pipeline_stages, whole_model

SHAPE = dict(hidden_size=64, num_attention_heads=4, seq_length=32, vocab_size=1000)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_no_cut_has_a_lighter_heaviest_part(weights, num_parts):
    num_parts = min(num_parts, len(weights))

    def heaviest(cuts):
        bounds = [0, *cuts, len(weights)]
        assert all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
        return max(sum(weights[a:b]) for a, b in zip(bounds, bounds[1:], strict=False))

    ours = heaviest(_even_cuts(tuple(weights), num_parts))
    assert ours == min(
        heaviest(cuts) for cuts in combinations(range(1, len(weights)), num_parts - 1)
    )


def test_stages_are_contiguous_and_name_their_ends():
    stages = pipeline_stages(ModelConfig(num_layers=7, **SHAPE), 3, "parameters")
    assert [s.is_first for s in stages] == [True, False, False]
    assert [s.is_last for s in stages] == [False, False, True]
    layers = [i for s in stages for i in range(s.first_layer, s.end_layer)]
    assert layers == list(range(7))
    whole = whole_model(ModelConfig(num_layers=7, **SHAPE))
    assert whole.is_first and whole.is_last and whole.end_layer == 7


def test_a_large_vocabulary_leaves_fewer_blocks_at_the_ends_and_flops_only_at_the_last():
    config = ModelConfig(num_layers=12, **SHAPE | {"vocab_size": 4000})

    def blocks(balance):
        return [s.end_layer - s.first_layer for s in pipeline_stages(config, 4, balance)]

    # A block has 12 h^2 = 49k weights; the table 4096 h = 262k, five blocks.
    assert blocks("parameters") == [1, 5, 5, 1]
    # The embedding costs no multiplication.
    assert blocks("flops") == [3, 4, 4, 1]
