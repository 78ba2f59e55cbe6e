"""The order of samples against plain references, and what it must not depend on."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.indexed.dataset import MAGIC, IndexedDataset
from megagpt.data.indexed.writer import IndexedDatasetWriter
from megagpt.data.samples import order
from megagpt.data.samples.gpt_dataset import GPTDataset, MegatronOrder
from megagpt.data.samples.order import SAMPLES_PER_MARK, epoch_index, megatron_index

# Lengths of the sequences of each document; some documents and some sequences are empty.
DOCUMENTS = [[7], [], [1], [3, 0, 4], [0], [30], [2, 5], [], [13], [4, 1, 1], [9]]
quick = settings(max_examples=60, deadline=None, derandomize=True)


def write_pair(prefix, documents, first_token=0):
    """Every token of the pair is another number."""
    lengths = np.array([length for document in documents for length in document], dtype=np.int32)
    with IndexedDatasetWriter(prefix, np.dtype("<i4")) as writer:
        writer.add_tokens(np.arange(first_token, first_token + lengths.sum(), dtype="<i4"))
        writer.add_lengths(lengths, np.array([len(document) for document in documents]))
    return IndexedDataset(prefix)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair") / "a", DOCUMENTS)


def samples_of(indexed, index, seq_length):
    """Tokens of each sample of an index, read one at a time."""
    tokens = []
    for number in index.order.tolist():
        place, skip = index.marks[number // SAMPLES_PER_MARK].tolist()
        behind = [token for s in index.sequences[place:].tolist() for token in indexed[s].tolist()]
        start = skip + number % SAMPLES_PER_MARK * seq_length
        tokens.append(behind[start : start + seq_length + 1])
    return tokens


def permutation(size, bits):
    """Numbers by the upper half of a key each, then by value."""
    keys = [int(bits.random_raw()) >> 32 for _ in range(size)]
    return sorted(range(size), key=lambda number: (keys[number], number))


def naive_epoch(indexed, documents, seq_length, seed, epoch, shuffle):
    stored = [indexed.document(d).tolist() for d in documents]
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = [d for d, tokens in enumerate(stored) if tokens]
    if shuffle:
        order = [order[number] for number in permutation(len(order), bits)]
    stream = [token for d in order for token in stored[d]]
    samples = []
    while len(samples) * seq_length + (seq_length if shuffle else 1) < len(stream):
        start = len(samples) * seq_length
        samples.append(stream[start : start + seq_length + 1])
    if shuffle:
        samples = [samples[slot] for slot in permutation(len(samples), bits)]
    return samples


@quick
@given(
    documents=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=12),
    one_each=st.booleans(),
    seq_length=st.integers(1, 12),
    epoch=st.integers(0, 3),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_an_epoch_is_that_of_the_naive_reference(
    tmp_path_factory, documents, one_each, seq_length, epoch, shuffle, data
):
    if one_each:  # the usual form of a pair has a path of its own
        documents = [[sum(document)] for document in documents]
    indexed = write_pair(tmp_path_factory.mktemp("pair") / "a", documents, first_token=100)
    start = data.draw(st.integers(0, len(documents) - 1))
    chosen = range(start, data.draw(st.integers(start + 1, len(documents))))
    if sum(map(sum, documents[chosen.start : chosen.stop])) < 2:
        return
    options = {"seq_length": seq_length, "seed": 5, "epoch": epoch, "shuffle": shuffle}
    index = epoch_index(indexed, chosen, **options)
    assert all(array.dtype == np.uint32 for array in (index.sequences, index.order, index.marks))
    expected = naive_epoch(indexed, chosen, seq_length, 5, epoch, shuffle)
    assert samples_of(indexed, index, seq_length) == expected


def test_as_many_sequences_as_documents_need_not_be_one_each(tmp_path):
    indexed = write_pair(tmp_path / "a", [[4, 3], [], [0], [5]])
    for shuffle in (True, False):
        options = {"seq_length": 2, "seed": 5, "epoch": 1, "shuffle": shuffle}
        index = epoch_index(indexed, range(4), **options)
        assert samples_of(indexed, index, 2) == naive_epoch(indexed, range(4), 2, 5, 1, shuffle)


def test_samples_depend_on_the_documents_of_the_split_alone(tmp_path, indexed):
    options = {"seq_length": 5, "seed": 3}
    inner = write_pair(tmp_path / "b", DOCUMENTS[2:9], first_token=7)
    one = GPTDataset(indexed, range(2, 9), **options)
    other = GPTDataset(inner, range(7), **options)
    for i in range(3 * len(one)):
        assert one[i].tolist() == other[i].tolist()


def test_neither_the_run_nor_the_batch_nor_the_ranks_change_a_sample(indexed):
    documents = range(len(DOCUMENTS))
    dataset = GPTDataset(indexed, documents, seq_length=5, seed=3)
    wanted = [dataset[i].tolist() for i in range(4 * len(dataset))]
    for batch, ranks in [(1, 1), (3, 2), (7, 1), (len(wanted), 3)]:
        read = {}
        for rank in range(ranks):
            own = GPTDataset(indexed, documents, seq_length=5, seed=3)
            mine = range(rank, len(wanted), ranks)
            for first in range(0, len(mine), batch):
                rows = own.gather(mine[first : first + batch]).tolist()
                read.update(zip(mine[first : first + batch], rows, strict=True))
        assert [read[i] for i in range(len(wanted))] == wanted


def test_seeds_and_epochs_have_orders_of_their_own(indexed):
    documents = range(len(DOCUMENTS))
    orders = {
        (seed, epoch): epoch_index(
            indexed, documents, seq_length=3, seed=seed, epoch=epoch, shuffle=True
        )
        for seed in range(4)
        for epoch in range(4)
    }
    assert len({index.sequences.tobytes() for index in orders.values()}) == len(orders)
    assert len({index.order.tobytes() for index in orders.values()}) == len(orders)


def naive_megatron(indexed, sequences, seq_length, seed, num_samples):
    """The samples of a run as Megatron-LM's GPTDataset has them, and whether an epoch is apart."""
    per_epoch = sum(len(indexed[sequence]) for sequence in sequences)
    num_epochs = 1
    while num_epochs * per_epoch < num_samples * seq_length + 1:
        num_epochs += 1
    apart = False
    if num_epochs > 1:
        before = ((num_epochs - 1) * per_epoch - 1) // seq_length
        apart = num_samples - before < int(0.80 * ((per_epoch - 1) // seq_length))
    state = np.random.RandomState(seed)

    def shuffled(values):
        array = np.array(values, dtype=np.int32)
        state.shuffle(array)
        return array.tolist()

    if apart:
        order = shuffled([*sequences] * (num_epochs - 1)) + shuffled([*sequences])
    else:
        order = shuffled([*sequences] * num_epochs)
    stream = [token for sequence in order for token in indexed[sequence].tolist()]
    total = (len(stream) - 1) // seq_length
    slots = [*range(total)]
    slots = shuffled(slots[:before]) + shuffled(slots[before:]) if apart else shuffled(slots)
    starts = [slot * seq_length for slot in slots]
    return [stream[start : start + seq_length + 1] for start in starts], num_epochs, apart


@pytest.mark.parametrize("seq_length", [1, 4, 7, 33])
def test_megatrons_order_is_that_of_the_naive_reference(indexed, seq_length):
    seen = set()
    for sequences in (range(indexed.num_sequences), range(2, 9)):
        per_epoch = indexed.num_tokens_between(sequences.start, sequences.stop) // seq_length
        for num_samples in range(1, 4 * per_epoch + 3, max(1, per_epoch // 12)):
            index = megatron_index(
                indexed, sequences, seq_length=seq_length, seed=11, num_samples=num_samples
            )
            expected, *kind = naive_megatron(indexed, sequences, seq_length, 11, num_samples)
            assert samples_of(indexed, index, seq_length) == expected, (sequences, num_samples)
            assert len(expected) >= num_samples
            seen.add(tuple(kind))
    assert {(1, False), (2, False)} <= seen
    assert seq_length == 33 or {(2, True), (3, True), (3, False)} <= seen


def test_a_dataset_replays_megatron(indexed):
    sequences = range(1, indexed.num_sequences)
    dataset = GPTDataset(
        indexed,
        range(len(DOCUMENTS)),
        seq_length=5,
        seed=11,
        megatron=MegatronOrder(sequences, num_samples=37),
    )
    expected, _, _ = naive_megatron(indexed, sequences, 5, 11, 37)
    assert len(dataset) == len(expected)
    assert [sample.tolist() for sample in dataset] == expected
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_streams_longer_than_uint32_are_cut_at_the_right_places(tmp_path):
    # The sequences hold more tokens than uint32 counts; the file of tokens has a hole for them.
    lengths = np.array([1_500_000_000, 5, 0, 2**31 - 1, 1_900_000_000, 3], dtype="<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths, dtype="<i8")])
    header = struct.pack("<9sQBQQ", MAGIC, 1, 1, len(lengths), len(lengths) + 1)
    bounds = np.arange(len(lengths) + 1, dtype="<i8")
    (tmp_path / "a.idx").write_bytes(
        header + lengths.tobytes() + pointers[:-1].tobytes() + bounds.tobytes()
    )
    with (tmp_path / "a.bin").open("wb") as file:
        file.truncate(int(pointers[-1]))
    indexed = IndexedDataset(tmp_path / "a")
    documents, seq_length = range(len(lengths)), 300_000_001
    for index in (
        epoch_index(indexed, documents, seq_length=seq_length, seed=1, epoch=0, shuffle=True),
        epoch_index(indexed, documents, seq_length=seq_length, seed=1, epoch=0, shuffle=False),
        megatron_index(indexed, documents, seq_length=seq_length, seed=1, num_samples=40),
    ):
        ends = np.cumsum(lengths[index.sequences], dtype=np.int64).tolist()
        assert len(index.order) >= (ends[-1] - 1) // seq_length
        assert sorted(index.order.tolist()) == [*range(len(index.order))]
        positions = [([0, *ends][place] + skip) for place, skip in index.marks.tolist()]
        assert positions == [
            *range(0, len(index.order) * seq_length, SAMPLES_PER_MARK * seq_length)
        ]
        assert max(positions) > 2**32
        assert all(skip < lengths[index.sequences[place]] for place, skip in index.marks)
    evaluation = GPTDataset(indexed, documents, seq_length=seq_length, seed=1, shuffle=False)
    for i in range(len(evaluation)):
        sequence, skip, _ = evaluation.pieces(i)[0]
        assert pointers[sequence] + skip == i * seq_length


def test_the_order_is_the_same_in_every_version(tmp_path):
    """These numbers were written down once: another order would skip and repeat data on resume."""
    indexed = write_pair(tmp_path / "a", [[10]] * 12)
    index = epoch_index(indexed, range(12), seq_length=8, seed=1234, epoch=3, shuffle=True)
    assert index.sequences.tolist() == [5, 2, 9, 3, 8, 10, 11, 0, 4, 1, 7, 6]
    assert index.order.tolist() == [10, 12, 9, 5, 11, 0, 1, 8, 6, 3, 7, 2, 4, 13]


@pytest.mark.parametrize("size", [0, 1, 2, 1000, 70_000])
def test_the_permutation_is_that_of_the_plain_rule(size):
    two = [np.random.PCG64(np.random.SeedSequence([size, 7])) for _ in range(2)]
    assert order._permutation(size, two[0]).tolist() == permutation(size, two[1])
