"""Blends: any slice, compiled or not, is that of the whole; shares hold; samples are gathered."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.native import load_native
from megagpt.data.samples import blended_dataset
from megagpt.data.samples.blend import Blend, megatron_blend
from megagpt.data.samples.blended_dataset import BlendedDataset, JoinedDataset
from megagpt.data.samples.gpt_dataset import PAD, GPTDataset

WEIGHTS = {
    "one": [3.0],
    "two": [0.7, 0.3],
    "equal": [1.0] * 5,
    "third": [1.0, 1 / 3, 1 / 3, 1 / 3],
    "eight": [5, 1, 1e-3, 2, 2, 0.1, 7, 3],
    "nine": [5, 1, 1e-3, 2, 2, 0.1, 7, 3, 1e-9],
    "300": np.random.default_rng(0).gamma(0.3, size=300).tolist(),
}
weight_lists = st.lists(st.floats(1e-6, 1e3) | st.sampled_from([1.0, 2.0]), min_size=1, max_size=12)
quick = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.fixture(params=list(WEIGHTS))
def weights(request):
    return WEIGHTS[request.param]


def in_python(monkeypatch):
    monkeypatch.setattr("megagpt.data.samples.blend.load_native", lambda: None)
    monkeypatch.setattr("megagpt.data.samples.gpt_dataset.load_native", lambda: None)


def order_by_due_time(weights, count):
    """The rule in plain Python: sample k of a member is due at (k + 1/2) / share."""
    shares = np.asarray(weights) / np.sum(weights)
    events = [
        ((k + (0.5 + member * (5**0.5 - 1) / 2) % 1.0) * (1 / share), member, k)
        for member, share in enumerate(shares)
        for k in range(int(2 * count * share) + count // 10 + 2)
    ]
    return [(member, k) for _, member, k in sorted(events)[:count]]


def slices(blend, begin, count):
    members, samples = blend.slice(begin, count)
    assert members.dtype == np.int32 and samples.dtype == np.int64
    return list(zip(members.tolist(), samples.tolist(), strict=True))


def test_positions_go_by_due_time(weights):
    count = 200 if len(weights) > 9 else 600
    assert slices(Blend(weights), 0, count) == order_by_due_time(weights, count)


@quick
@given(weight_lists, st.integers(0, 3000), st.integers(0, 700))
def test_any_slice_is_that_of_the_whole(weights, begin, count):
    whole = slices(Blend(weights), 0, begin + count)
    assert slices(Blend(weights), begin, count) == whole[begin:]


def test_slices_of_many_members_are_those_of_the_whole():
    weights = np.random.default_rng(1).lognormal(sigma=3, size=33_000)
    blend = Blend(weights)
    whole = slices(blend, 0, 80_000)
    for begin, count in [(0, 5), (1, 40_000), (32_999, 10), (79_000, 1000)]:
        assert slices(blend, begin, count) == whole[begin : begin + count]
    assert max(member for member, _ in whole) > 32_767


def test_the_compiled_walk_is_that_of_python(weights, monkeypatch):
    assert load_native() is not None
    places = [(0, 700), (1, 50), (12_345, 3000), (10**12, 999), (7, 0)]
    compiled = [slices(Blend(weights), *place) for place in places]
    counts = [Blend(weights).counts(begin).tolist() for begin, _ in places]
    in_python(monkeypatch)
    assert [slices(Blend(weights), *place) for place in places] == compiled
    assert [Blend(weights).counts(begin).tolist() for begin, _ in places] == counts


@quick
@given(weight_lists, st.integers(0, 20_000))
def test_each_member_counts_up_without_gaps_and_has_its_share(weights, end):
    blend = Blend(weights)
    members, samples = blend.slice(0, end)
    for member, share in enumerate(blend.shares):
        given_by = members == member
        np.testing.assert_array_equal(samples[given_by], np.arange(given_by.sum()))
        # Before any time t a member has had t * share to within 1; so t lies within m of the
        # position.
        error = np.abs(np.cumsum(given_by) - share * np.arange(1, end + 1))
        assert error.max(initial=0) <= 1 + share * (len(weights) + 1)
    np.testing.assert_array_equal(blend.counts(end), np.bincount(members, minlength=len(weights)))


def test_a_large_member_among_many_small_ones_keeps_its_share_at_every_prefix():
    members, _ = Blend([0.5] + [0.5 / 299] * 299).slice(0, 5000)
    error = np.abs(np.cumsum(members == 0) - np.arange(1, 5001) / 2)
    assert error.max() < 10


def test_equal_weights_take_turns():
    for size in (2, 8, 9, 300):
        rounds = np.array(slices(Blend([0.1] * size), 0, 7 * size)).reshape(7, size, 2)
        for number, turn in enumerate(rounds):
            assert sorted(turn[:, 0]) == list(range(size)) and (turn[:, 1] == number).all()


def test_a_member_of_tiny_weight_waits_beyond_the_run():
    for weights in ([1.0, 1e-12], [1e-300, 1.0], [1.0] * 9 + [1e-12]):
        tiny = int(np.argmin(weights))
        blend = Blend(weights)
        assert blend.counts(10**6)[tiny] == 0
        assert all(member != tiny for member, _ in slices(blend, 10**6, 1000))


@pytest.mark.parametrize("begin", [10**9, 10**12 - 3, 10**12, 2**45])
def test_large_positions_agree_with_their_neighbours(weights, begin):
    blend = Blend(weights)
    around = slices(blend, begin - 50, 2000)
    assert slices(blend, begin, 1950) == around[50:]
    before, after = blend.counts(begin - 50), blend.counts(begin + 1950)
    assert before.sum() == begin - 50 and after.sum() == begin + 1950
    members = np.array([member for member, _ in around])
    np.testing.assert_array_equal(after - before, np.bincount(members, minlength=len(weights)))
    assert np.abs(after - blend.shares * (begin + 1950)).max() < 1 + len(weights)


def megatrons_rule(weights, count):
    total = float(np.sum(np.array(weights)))
    shares, counts, order = [weight / total for weight in weights], [0] * len(weights), []
    for i in range(count):
        errors = [share * max(i, 1) - had for share, had in zip(shares, counts, strict=True)]
        member = errors.index(max(errors))
        order.append((member, counts[member]))
        counts[member] += 1
    return order


def test_megatrons_blend_is_its_rule(weights, monkeypatch):
    count = 400 if len(weights) > 9 else 2000
    expected = megatrons_rule(np.array(weights) / np.sum(weights), count)
    for _ in ("compiled", "python"):
        members, samples = megatron_blend(weights, count)
        assert members.dtype == np.int32 and samples.dtype == np.int64
        assert list(zip(members.tolist(), samples.tolist(), strict=True)) == expected
        in_python(monkeypatch)


def test_megatrons_blend_rounds_as_its_two_divisions_do():
    weights = np.array([0.81, 0.1, 0.1, 0.1, 0.1, 0.41])
    once = weights / weights.sum()
    members, _ = megatron_blend(weights, 4096)
    assert members.tolist() == [member for member, _ in megatrons_rule(once, 4096)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs whose tokens say whose they are."""
    directory = tmp_path_factory.mktemp("pairs")
    for name, size in enumerate((9, 40, 23)):
        with IndexedDatasetWriter(directory / str(name), np.dtype("<i4")) as writer:
            for document in range(size):
                writer.add_document(np.arange(7) + 10_000 * name + 10 * document)
    return [IndexedDataset(directory / str(name)) for name in range(3)]


def datasets(pairs, **options):
    return [
        GPTDataset(pair, range(pair.num_documents), seq_length=8, seed=1, **options)
        for pair in pairs
    ]


def one_by_one(dataset, indices, locate):
    rows = [dataset.datasets[member][sample] for member, sample in map(locate, indices)]
    return np.stack(rows)


@pytest.mark.parametrize("megatron_samples", [None, 500])
def test_a_blend_gathers_what_its_members_give(pairs, monkeypatch, megatron_samples):
    monkeypatch.setattr(blended_dataset, "_BLOCK", 64)
    weights = [0.5, 3.0, 1.0]
    blend = BlendedDataset(datasets(pairs), weights, megatron_samples=megatron_samples)
    if megatron_samples is None:
        places = slices(Blend(weights), 0, 500)
    else:
        places = megatrons_rule(np.array(weights) / np.sum(weights), 500)
    random = np.random.default_rng(0)
    for indices in [
        [0],
        [],
        range(60, 70),
        range(127, 64, -1),
        [499, 0, 499, 63, 64, 128, 191, 192],
        random.integers(0, 500, 200),
        random.permutation(500),
    ]:
        gathered = blend.gather(indices)
        out = np.full((len(indices), 9), -7)
        assert blend.gather(indices, out) is out
        assert gathered.shape == (len(indices), 9) and gathered.dtype == np.int64
        np.testing.assert_array_equal(gathered, out)
        if len(indices):
            expected = one_by_one(blend, indices, places.__getitem__)
            np.testing.assert_array_equal(gathered, expected)
            assert [blend.locate(i) for i in indices[:9]] == [places[i] for i in indices[:9]]
    assert blend.counts(130).tolist() == np.bincount([m for m, _ in places[:130]]).tolist()
    with pytest.raises(IndexError):
        blend.gather([3, -1])
    if megatron_samples is not None:
        with pytest.raises(IndexError):
            blend.gather([megatron_samples])


def test_joined_datasets_give_one_member_after_the_other(pairs, monkeypatch):
    joined = JoinedDataset(datasets(pairs, shuffle=False))
    lengths = [len(dataset) for dataset in joined.datasets]
    places = [(member, i) for member, length in enumerate(lengths) for i in range(length)]
    assert len(joined) == len(places) == sum(lengths)
    for indices in (range(len(joined)), [len(joined) - 1, 0, lengths[0], lengths[0] - 1], []):
        out = np.full((len(indices), 9), -7)
        assert joined.gather(indices, out) is out
        if len(indices):
            expected = one_by_one(joined, indices, places.__getitem__)
            np.testing.assert_array_equal(joined.gather(indices), expected)
            np.testing.assert_array_equal(out, expected)
    # Each member's last sample is padded; nothing runs over into the next member.
    tokens = joined.gather(range(len(joined)))
    tokens_of = [np.unique(tokens[[m == i for m, _ in places]] // 10_000) for i in range(3)]
    assert [set(found.tolist()) - {PAD} for found in tokens_of] == [{0}, {1}, {2}]
    for index in (-1, len(joined)):
        with pytest.raises(IndexError):
            joined.gather([index])
