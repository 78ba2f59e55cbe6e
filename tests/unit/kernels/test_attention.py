"""Attention: the definition's mask, and each back end that runs here against the definition."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.samples.masks import document_boundaries
from megagpt.kernels.attention import cpu, cuda
from megagpt.kernels.attention.contract import Documents
from megagpt.kernels.attention.reference import attention

EOD = 9
# Relative, of whole tensors, against fp64 of the same inputs. bf16: softmax and slopes are rounded
# before the products that they enter, as in torch's own flash kernels.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
DEVICE = torch.device("cpu")


def documents_of(tokens):
    positions, offsets = document_boundaries(np.ascontiguousarray(tokens), EOD)
    return Documents(torch.from_numpy(positions)), offsets


def random_documents(generator, b, s):
    return documents_of(generator.choice([1, 2, 3, 4, EOD], size=(b, s)))[0]


def test_a_token_sees_itself_and_earlier_ones_of_its_document():
    tokens = np.array([[5, 6, EOD, 7, 8, EOD, EOD, 1], [EOD, 1, 2, 3, 4, 5, 6, EOD]])
    documents, _ = documents_of(tokens)
    b, s = tokens.shape
    # Each value says whose it is, and scores are equal: what comes out is the mean of the seen.
    value = torch.eye(s).expand(b, s, s).unsqueeze(2).contiguous()
    zeros = torch.zeros_like(value)
    shares = attention(zeros, zeros, value, documents)[:, :, 0]  # [b, query, key]
    for row, query, key in itertools.product(range(b), range(s), range(s)):
        between = tokens[row, key:query]
        is_seen = key <= query and EOD not in between
        assert bool(shares[row, query, key]) == is_seen, (row, query, key)


def test_offsets_are_those_of_the_data_pipeline():
    documents, offsets = documents_of(np.array([[5, EOD, 7, EOD], [EOD, 1, 2, 3]]))
    assert documents.offsets.tolist() == offsets.tolist() == [0, 2, 4, 5, 8]
    assert documents.offsets.dtype == torch.int32


def gradients(function, tensors, upstream, documents):
    tensors = [x.clone().requires_grad_() for x in tensors]
    out = function(*tensors, documents)
    out.backward(upstream)
    return [out.detach(), *(x.grad for x in tensors)]


def need_vectors(dtype):
    """Skips where the processor lacks them; a compiler that fails, fails."""
    problem = cpu.problem(DEVICE, dtype, head_size=64)
    if problem is not None and "no 512-bit vectors" in problem:
        pytest.skip(problem)
    assert problem is None, problem


def check(dtype, b, s, n, k, d, has_documents, seed=0):
    need_vectors(dtype)
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    query, upstream = torch.randn(2, b, s, n, d).to(dtype)
    key, value = torch.randn(2, b, s, k, d).to(dtype)
    documents = random_documents(generator, b, s) if has_documents else None
    ours = gradients(cpu.attention, (query, key, value), upstream, documents)
    wide = [x.double() for x in (query, key, value)]
    exact = gradients(attention, wide, upstream.double(), documents)
    for name, mine, truth in zip(("out", "query", "key", "value"), ours, exact, strict=True):
        # A lone token has no gradient of query and key: what is left is rounding.
        scale = truth.norm() + 0.3 * upstream.double().norm()
        error = ((mine.double() - truth).norm() / scale).item()
        assert error < TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize(
    ("b", "s", "n", "k", "d"),
    [(1, 1, 1, 1, 16), (2, 5, 2, 1, 16), (2, 64, 4, 2, 32), (1, 130, 4, 4, 64), (2, 257, 6, 2, 80),
     (1, 65, 2, 1, 256)],
)  # fmt: skip
def test_the_cpus_equals_the_definition(dtype, b, s, n, k, d, has_documents):
    check(dtype, b, s, n, k, d, has_documents)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(TOLERANCE)), st.integers(1, 3), st.integers(1, 200), st.integers(1, 3),
    st.integers(1, 3), st.integers(1, 6), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_the_cpus_equals_the_definition_whatever_the_shape(dtype, b, s, k, share, d, docs, seed):
    check(dtype, b, s, k * share, k, 16 * d, docs, seed)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_number_of_threads_changes_no_bit(dtype):
    need_vectors(dtype)
    torch.manual_seed(0)
    query, key, value, upstream = torch.randn(4, 2, 150, 4, 32).to(dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(cpu.attention, (query, key, value), upstream, None))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_head_sizes_that_vectors_do_not_fit_are_refused_with_the_reason():
    assert "head_size=24" in cpu.problem(DEVICE, torch.float32, head_size=24)
    assert "float64" in cpu.problem(DEVICE, torch.float64, head_size=64)


def by_document(query, key, value, offsets):
    """What variable-length attention does, one sequence after the other."""
    parts = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        q, k, v = (x[begin:end].transpose(0, 1).float() for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=len(q) != len(k)
        )
        parts.append(attended.transpose(0, 1).to(query.dtype))
    return torch.cat(parts)


def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal and query.shape == key.shape == value.shape and max_q == max_k
    assert torch.equal(cu_seq_q, cu_seq_k)
    return by_document(query, key, value, cu_seq_q)


def of_torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    return by_document(query, key, value, cu_seq_q)


@pytest.mark.parametrize("torchs", [of_torch_2_10, of_torch_2_13, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [4, 2])
def test_a_gpus_hands_torch_the_documents_whatever_its_release(torchs, dtype, k, monkeypatch):
    module = SimpleNamespace(varlen_attn=torchs)

    def find(name):
        if torchs is None:
            raise ModuleNotFoundError(name)
        return module

    monkeypatch.setattr(cuda.importlib, "import_module", find)
    cuda._varlen.cache_clear()
    torch.manual_seed(0)
    query = torch.randn(2, 11, 4, 16).to(dtype)
    key, value = torch.randn(2, 2, 11, k, 16).to(dtype)
    documents = random_documents(np.random.default_rng(0), 2, 11)
    ours = cuda.attention(query, key, value, documents)
    cuda._varlen.cache_clear()
    exact = attention(*(x.double() for x in (query, key, value)), documents)
    assert (ours.double() - exact).norm() / exact.norm() < TOLERANCE[dtype]
