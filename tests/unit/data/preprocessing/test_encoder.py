"""The compiled BPE gives SentencePiece's tokens for every text and model, or stands aside."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megagpt.data.native import load_native
from megagpt.data.preprocessing.encoder import DocumentEncoder, NativeBpe, compare_with_tokenizer
from megagpt.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

ROOT = Path(__file__).resolve().parents[4]
LETTERS = "съешьжеещёэтихмягкихфранцузскихбулокдавыпейчаю" * 2
IDEOGRAPHS = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜" * 2
TEXT = "\n".join(
    [
        (ROOT / "megagpt/data/preprocessing/documents.py").read_text() * 2,
        (ROOT / "README.md").read_text()[:8000],
        "Съешь же ещё этих мягких французских булок, да выпей чаю.\n" * 5 + LETTERS,
        "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。\n" * 5 + IDEOGRAPHS,
        "0123456789 12 345 2024-11-30\tab  ab   ab\n" * 5,
    ]
)
OWN = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.999,
    "eos_piece": "<eod>",
    "vocab_size": 900,
    "max_sentence_length": 1 << 20,
    "minloglevel": 2,
}
WHOLE_LINES = {"split_by_whitespace": False, "split_by_unicode_script": False}
SYMBOLS = {"user_defined_symbols": ["<sep>", "\n", "ab", "▁▁", "<|x|>"]}
MODELS = {
    "prefix": {"add_dummy_prefix": True},
    "prefix and symbols": {"add_dummy_prefix": True, **SYMBOLS},
    "symbols": SYMBOLS,
    "pieces across words": {**WHOLE_LINES, "split_by_number": False, "vocab_size": 1500},
    "one digit a piece": {"split_digits": True, "split_by_unicode_script": False},
}
ODD = " \n\t\0\u2581\u00a0\ufeff\u0301\u200d👩👧e漢字жы019ab<>/"
SYMBOL_TEXTS = [
    "<eod>",
    "</s>",
    "<0x0A>",
    "<unk>",
    "<s>",
    "<sep>",
    "<|x|>",
    "ab",
    "  ",
    "👩\u200d👧",
]
texts = (
    st.text(max_size=60)
    | st.text(alphabet=ODD, max_size=60)
    | st.lists(st.sampled_from([*SYMBOL_TEXTS, *ODD, "the", "ing"]), max_size=40).map("".join)
    | st.integers(0, len(TEXT) - 90).flatmap(
        lambda begin: st.integers(0, 90).map(lambda size: TEXT[begin : begin + size])
    )
)


def train(path, **options):
    lines, model = (line for line in TEXT.split("\n") if line.strip()), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **{**OWN, **options}
    )
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


@pytest.fixture(scope="module", params=["own 400", "own 1900", *MODELS])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "a.model"
    if request.param.startswith("own"):
        size = int(request.param.split()[1])
        return train_sentencepiece(iter([TEXT[: size * 12]]), path, vocab_size=size)
    return train(path, **MODELS[request.param])


@pytest.fixture(scope="module")
def encoder(tokenizer):
    encoder = DocumentEncoder(tokenizer)
    assert encoder.slow_reason is None
    return encoder


@pytest.fixture
def own(tmp_path):
    return train(tmp_path / "own.model", vocab_size=600)


def built_model(path, pieces, **normalizer):
    """A model of (piece, score, type) beside the control symbols and the bytes."""
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.add_dummy_prefix = normalizer.get("add_dummy_prefix", False)
    model.normalizer_spec.remove_extra_whitespaces = False
    for piece, score, kind in [
        *[("<unk>", 0, 2), ("<eod>", 0, 3), *((f"<0x{byte:02X}>", 0, 6) for byte in range(256))],
        *pieces,
    ]:
        model.pieces.add(piece=piece, score=score, type=kind)
    path.write_bytes(model.SerializeToString())
    return SentencePieceTokenizer(path)


def assert_same_tokens(encoder, documents):
    tokenizer = encoder.tokenizer
    tokens, lengths = encoder.encode(documents)
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in documents]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(texts, max_size=5))
def test_compiled_tokens_are_those_of_sentencepiece(encoder, documents):
    assert_same_tokens(encoder, documents)


def test_runs_of_one_character(encoder):
    sizes = [*range(1, 28), 48, 49, 255, 1000, 5000]
    assert_same_tokens(encoder, [c * size for c in " a-\n▁漢ж0\0" for size in sizes])


def test_chunks_of_every_length_around_the_limits(encoder):
    # The code has limits at 8 and 16 bytes of a chunk, at 3 of its tokens and at 24 of its symbols.
    words = "deterministicallyorderedrepresentationsofinternationalizations"
    sources = [words, LETTERS, IDEOGRAPHS, "a-" * 30, "=" * 60, f"{words[:20]}▁{LETTERS[:20]}"]
    for begin in (0, 1, 5):
        chunks = [text[begin : begin + size] for text in sources for size in range(42)]
        for around in ("", "(", "\n"):
            assert_same_tokens(encoder, [around + chunk + around for chunk in chunks])


def test_the_cache_may_forget(tokenizer, monkeypatch):
    monkeypatch.setattr("megagpt.data.preprocessing.encoder.CHUNK_CACHE_BYTES", 256)
    encoder = DocumentEncoder(tokenizer)
    documents = [TEXT[begin : begin + 400] for begin in range(0, 12_000, 400)]
    for _ in range(2):
        assert_same_tokens(encoder, documents)


def test_a_document_of_more_than_a_megabyte_between_small_ones(own):
    assert_same_tokens(DocumentEncoder(own), ["", TEXT * (1_100_000 // len(TEXT) + 1), "a", ""])


def test_no_documents_give_no_tokens(own):
    for encoder in (DocumentEncoder(own), DocumentEncoder(own, slow_reason="compared")):
        tokens, lengths = encoder.encode([])
        assert len(tokens) == len(lengths) == 0 and tokens.dtype == encoder.dtype


def test_tokens_of_large_vocabularies_are_int32(own, monkeypatch):
    target = "megagpt.data.preprocessing.encoder.token_dtype"
    monkeypatch.setattr(target, lambda size: np.dtype("<i4"))
    encoder = DocumentEncoder(own)
    assert encoder.slow_reason is None and encoder.encode(["a"])[0].dtype == np.int32
    assert_same_tokens(encoder, TEXT.split("\n"))


@st.composite
def small_models(draw):
    """Pieces over a tiny alphabet, most of equal score, some user-defined, and texts of them."""
    alphabet = draw(st.sampled_from(["ab▁", "aж▁\n", "▁a", "漢é▁b"]))
    pieces = dict.fromkeys("▁" + draw(st.text(alphabet=alphabet, max_size=3)))
    for _ in range(draw(st.integers(0, 25))):
        parts = st.sampled_from([*pieces, *alphabet])
        pieces[(draw(parts) + draw(parts))[:20]] = None
    scores = draw(st.sampled_from([[0.0], [0.0, -1.0], [-0.5, 1e-7, 2e-7, -3.0]]))
    kinds = st.sampled_from([1] * 7 + [4])
    listed = [
        (piece, draw(st.sampled_from(scores)), 1 if piece == "▁" else draw(kinds))
        for piece in draw(st.permutations(list(pieces)))
    ]
    text = st.text(alphabet=alphabet + " x", max_size=70)
    return listed, draw(st.booleans()), draw(st.lists(text, min_size=1, max_size=8))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(small_models())
def test_any_pieces_and_equal_scores_give_the_tokens_of_sentencepiece(tmp_path_factory, drawn):
    pieces, prefix, documents = drawn
    path = tmp_path_factory.mktemp("model") / "a.model"
    encoder = DocumentEncoder(built_model(path, pieces, add_dummy_prefix=prefix))
    assert encoder.slow_reason is None
    for _ in range(2):
        assert_same_tokens(encoder, documents)


def test_the_leftmost_of_equal_merges_comes_first(tmp_path):
    pieces = [(piece, 0.0, 1) for piece in ("▁", "a", "b", "aa", "ab", "ba")]
    encoder = DocumentEncoder(built_model(tmp_path / "a.model", pieces))
    ids = {piece: 258 + i for i, (piece, _, _) in enumerate(pieces)}
    for text, expected in [("aaa", "aa a"), ("aab", "aa b"), ("bab", "ba b"), ("abab", "ab ab")]:
        assert encoder.encode([text])[0].tolist() == [*(ids[p] for p in expected.split()), 1]
        long = text * 30
        assert encoder.encode([long])[0].tolist() == [*encoder.tokenizer.encode(long), 1]


def test_text_never_becomes_a_control_symbol(encoder):
    tokenizer = encoder.tokenizer
    control = [i for i, p in enumerate(tokenizer.model_proto().pieces) if p.type in (2, 3)]
    documents = [f"{a}{b}" for a in ("<eod>", "<unk>", "<s>", "</s>") for b in ("", "a", " ", "▁")]
    tokens, lengths = encoder.encode(documents)
    ends = np.cumsum(lengths) - 1
    assert (tokens[ends] == tokenizer.eod).all()
    assert not np.isin(np.delete(tokens, ends), control).any()


@pytest.mark.parametrize("kind", [1, 4])
def test_a_piece_of_nul_gives_the_tokens_of_sentencepiece(tmp_path, kind):
    pieces = [("▁", 0, 1), ("a", 0, 1), ("\0", 0, kind)]
    assert_same_tokens(DocumentEncoder(built_model(tmp_path / "a.model", pieces)), ["a\0a"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normaliser"),
        ({"remove_extra_whitespaces": True}, "normaliser"),
        ({"byte_fallback": False}, "byte fallback"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces"),
    ],
)
def test_other_models_are_left_to_the_tokenizer(tmp_path, options, reason):
    encoder = DocumentEncoder(train(tmp_path / "a.model", **options))
    assert reason in encoder.slow_reason
    assert_same_tokens(encoder, ["", *TEXT[:5000].split("\n"), "ﬁ  x ▁ \0"])


@pytest.mark.parametrize(
    ("pieces", "reason"),
    [
        ([("a", 0, 1)], "no piece for a space"),
        ([("a", 0, 1), ("▁", 0, 4)], "no piece for a space"),
        ([("▁", 0, 1), ("a", 0, 1), ("aa", 0, 5)], "unused"),
        ([("▁", 0, 1), ("a", 0, 1), ("a a", 0, 4)], "user-defined pieces with a space"),
    ],
)
def test_built_models_are_left_to_the_tokenizer(tmp_path, pieces, reason):
    encoder = DocumentEncoder(built_model(tmp_path / "a.model", pieces))
    assert reason in encoder.slow_reason
    assert_same_tokens(encoder, ["", "aa", "a a  a", "aaab a"])


def test_without_a_compiler_the_tokenizer_encodes(own, monkeypatch):
    assert load_native() is not None
    fast = DocumentEncoder(own).encode(TEXT.split("\n"))
    monkeypatch.setattr("megagpt.data.preprocessing.encoder.load_native", lambda: None)
    encoder = DocumentEncoder(own)
    assert encoder.slow_reason == "the compiled encoder is not there"
    for one, other in zip(fast, encoder.encode(TEXT.split("\n")), strict=True):
        assert one.dtype == other.dtype and one.tolist() == other.tolist()


def test_the_comparison_finds_a_broken_encoder(own, monkeypatch):
    encoder, documents = DocumentEncoder(own), ["one", "two", "broken"]
    assert compare_with_tokenizer(encoder, documents) is None
    real = NativeBpe.encode
    monkeypatch.setattr(
        NativeBpe, "encode", lambda self, texts: real(self, [t.replace("ok", "k") for t in texts])
    )
    assert "differs from" in (problem := compare_with_tokenizer(encoder, documents))
    assert problem.endswith("in text 3")
    slow = DocumentEncoder(own, slow_reason=problem)
    assert slow.slow_reason == problem and compare_with_tokenizer(slow, documents) is None
    assert_same_tokens(slow, documents)


def test_the_comparison_stops_after_some_documents(own):
    seen = []
    compare_with_tokenizer(DocumentEncoder(own), (seen.append(i) or TEXT for i in range(1000)))
    assert 200_000 < len(seen) * len(TEXT) < 200_000 + 2 * len(TEXT)
