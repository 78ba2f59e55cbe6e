"""Folders of transformers: the same logits both ways, the same bytes after a round trip."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megagpt.checkpoint.directory import step_directory
from megagpt.checkpoint.format import manifest, reader, shard_file
from megagpt.checkpoint.format.manifest import (
    CheckpointManifest,
    CheckpointState,
    Layout,
    Piece,
    TensorRecord,
    optimizer_file,
    weights_file,
    write_manifest,
)
from megagpt.checkpoint.format.reader import CheckpointReader, verify_checkpoint
from megagpt.checkpoint.format.shard_file import ShardWriter
from megagpt.checkpoint.format.slices import Slice
from megagpt.checkpoint.huggingface.convert import export_checkpoint, import_checkpoint
from megagpt.checkpoint.huggingface.names import (
    model_config,
    parameter_shapes,
)
from megagpt.checkpoint.same_run import refuse_other_run
from megagpt.checkpoint.weights import load_weights
from megagpt.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig
from megagpt.data.tokenizers.tokenizer import load_tokenizer, train_sentencepiece
from megagpt.inference.export import export, tokenizer_files
from megagpt.inference.load import build_model, load

transformers.logging.set_verbosity_error()

VOCAB, LENGTH = 61, 13
ROPE = {"rope_type": "default", "rope_theta": 500.0}


def gpt2(**settings):
    shape = dict(vocab_size=VOCAB, n_positions=LENGTH, n_embd=24, n_layer=3, n_head=4)
    tokens = dict(bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(GPT2Config(**{**shape, **tokens, **settings}))


LLAMA = dict(
    vocab_size=VOCAB, max_position_embeddings=LENGTH, hidden_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=40, rope_parameters=ROPE,
)  # fmt: skip


def llama(**settings):
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **settings}))


def qwen3(**settings):
    return Qwen3ForCausalLM(Qwen3Config(**{**LLAMA, "head_dim": 8, **settings}))


MODELS = {
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False, vocab_size=67),
    "gpt2-inner": lambda: gpt2(n_inner=36, layer_norm_epsilon=1e-3),
    "llama": lambda: llama(num_key_value_heads=4),
    "llama-grouped-tied": lambda: llama(tie_word_embeddings=True),
    "llama-bias": lambda: llama(attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "qwen3": qwen3,
}


def saved(model, folder, **options):
    """A folder of a model with weights that hide no fault: biases and norms too are random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder, **options)
    return folder


def edit(folder, **values):
    """Changes config.json; None as a value removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def logits(checkpoint, tokens):
    state, weights = load_weights(checkpoint)
    return build_model(state.config, weights, device=torch.device("cpu")).logits(tokens)


def their_logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def assert_close(ours, theirs):
    # fp32 sums of at most 40 terms in another order, over three layers.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """No power failure is tested here, and a busy disk takes a second for each file."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_import_says_the_same_and_export_gives_the_bytes_back(name, tmp_path, tokens):
    theirs = saved(MODELS[name](), tmp_path / "theirs")
    step = import_checkpoint(theirs, tmp_path / "run")
    assert verify_checkpoint(step) == []
    reference = their_logits(theirs, tokens)
    assert_close(logits(tmp_path / "run", tokens), reference)
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    back, original = (load_file(tmp_path / f / "model.safetensors") for f in ("back", "theirs"))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    assert torch.equal(their_logits(tmp_path / "back", tokens), reference)


OURS = {
    "gpt2": dict(),
    "gpt2-untied": dict(tie_embeddings=False, ffn_hidden_size=40),
    "llama": dict(
        num_kv_heads=2, normalization="rmsnorm", position_embedding="rope", rope_theta=700.0,
        activation="swiglu", bias=False, tie_embeddings=False,
    ),
    "qwen3": dict(
        num_kv_heads=2, normalization="rmsnorm", position_embedding="rope", activation="swiglu",
        bias=False, qk_norm=True,
    ),
}  # fmt: skip


def cut(shape):
    """A tensor in pieces such as layouts write them: two boxes of columns, or parts of the rows.

    The second box is cut once more, in the middle of a row, as ZeRO does.
    """
    if len(shape) == 1:
        middle = shape[0] // 2
        whole = (0, shape[0]), (0, 1)
        return [Slice(*whole, 0, middle), Slice(*whole, middle, shape[0])]
    rows, columns = shape
    left = columns // 3
    boxes = (0, rows), (0, left), (left, columns)
    size = rows * (columns - left)
    return [
        Slice(boxes[0], boxes[1], 0, rows * left),
        Slice(boxes[0], boxes[2], 0, size // 2 + 1),
        Slice(boxes[0], boxes[2], size // 2 + 1, size),
    ]


def write_checkpoint(run, config, weights):
    """A checkpoint of three ranks, each with its pieces of the weights."""
    step = step_directory(run / "checkpoints", 7)
    step.mkdir(parents=True)
    fp32, files, records = np.dtype(np.float32), {}, {}
    pieces = {name: cut(value.shape) for name, value in weights.items()}
    for shard in range(3):
        mine = {name: cuts[shard] for name, cuts in pieces.items() if shard < len(cuts)}
        writers = {
            weights_file(shard): {name: ((part.size,), fp32) for name, part in mine.items()},
            optimizer_file(shard): {},
        }
        for file, header in writers.items():
            writer = ShardWriter(step / file, header)
            for name in header:
                part = mine[name]
                matrix = weights[name].reshape(len(weights[name]), -1)
                box = matrix[slice(*part.rows), slice(*part.columns)]
                writer.write(box.ravel()[part.start : part.end])
            files[file] = writer.close()
    for name, cuts in pieces.items():
        parts = tuple(Piece(shard, part) for shard, part in enumerate(cuts))
        records[name] = TensorRecord(weights[name].shape, parts)
    state = CheckpointState(7, 56, 728, Config(model=config), {})
    write_manifest(step, CheckpointManifest(state, Layout(3), records, files, {}))
    return step


def our_checkpoint(run, **settings):
    config = ModelConfig(
        num_layers=2, hidden_size=24, num_attention_heads=4, seq_length=LENGTH, vocab_size=VOCAB,
        **settings,
    )  # fmt: skip
    random = np.random.default_rng(0)
    weights = {
        name: random.normal(0.0, 0.3, shape).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    return write_checkpoint(run, config, weights)


@pytest.mark.parametrize("name", OURS)
def test_export_of_several_pieces_says_the_same(name, tmp_path, tokens):
    step = our_checkpoint(tmp_path / "run", **OURS[name])
    export_checkpoint(step, tmp_path / "theirs", max_shard_bytes=5000)
    files = sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    held = {tensor: file for file in files for tensor in load_file(tmp_path / "theirs" / file)}
    assert index["weight_map"] == held
    ours = logits(step, tokens)
    assert_close(their_logits(tmp_path / "theirs", tokens), ours)
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")  # of a sharded folder
    assert torch.equal(logits(tmp_path / "again", tokens), ours)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_export_rounds_to_nearest_and_import_reads_it_exactly(dtype, tmp_path):
    step = our_checkpoint(tmp_path / "run")
    export_checkpoint(step, tmp_path / "theirs", dtype=dtype)
    torch_type = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto").dtype == (
        torch_type
    )
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")
    again = load_weights(tmp_path / "again")[1]
    for name, value in load_weights(step)[1].items():
        assert torch.equal(again[name], value.to(torch_type).float()), name


def test_a_weight_beyond_fp16_is_refused(tmp_path):
    config = ModelConfig(num_layers=1, hidden_size=4, num_attention_heads=1, vocab_size=5)
    weights = {n: np.ones(s, np.float32) for n, s in parameter_shapes(config).items()}
    weights["layers.0.mlp.up.bias"][3] = 1e5
    step = write_checkpoint(tmp_path / "run", config, weights)
    with pytest.raises(ValueError, match=r"mlp\.c_fc\.bias has a value of 1e\+05"):
        export_checkpoint(step, tmp_path / "theirs", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_what_is_there_is_not_touched(tmp_path):
    step = our_checkpoint(tmp_path / "run")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "note").write_text("mine")
    with pytest.raises(ValueError, match="is there already"):
        export_checkpoint(step, tmp_path / "theirs")
    export_checkpoint(step, tmp_path / "other")
    with pytest.raises(ValueError, match="is there already"):
        import_checkpoint(tmp_path / "other", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "note").read_text() == "mine"
    assert not list(tmp_path.glob(".staging*"))


def test_a_damaged_checkpoint_leaves_nothing(tmp_path):
    step = our_checkpoint(tmp_path / "run")
    path = step / weights_file(2)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        export_checkpoint(step, tmp_path / "theirs")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(qk_norm=True), "model.qk_norm=True"),
        (dict(bias=False), "model.bias=False"),
        (dict(num_kv_heads=2), "model.num_kv_heads=2"),
        (dict(activation="swiglu"), "model.activation=swiglu"),
        (dict(OURS["llama"], normalization="layernorm"), "model.normalization=layernorm"),
        (dict(OURS["qwen3"], bias=True), "model.bias=True"),
    ],
)
def test_a_model_without_architecture_is_refused(settings, message, tmp_path):
    step = our_checkpoint(tmp_path / "run", **settings)
    with pytest.raises(ValueError, match=message) as refused:
        export_checkpoint(step, tmp_path / "theirs")
    assert "\n" not in str(refused.value) and "to export" in str(refused.value)


SCALED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("build", "values", "message"),
    [
        (gpt2, dict(activation_function="relu"), "activation_function=relu"),
        (gpt2, dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
        (gpt2, dict(model_type="gpt_neox"), "model_type=gpt_neox"),
        (gpt2, dict(n_inner=95.5), "n_inner=95.5"),
        (gpt2, dict(n_layer="3"), "n_layer=3"),
        (gpt2, dict(n_head=5), "num_attention_heads=5"),
        (gpt2, dict(n_layer=2), "has the unknown tensor transformer.h.2"),
        (gpt2, dict(n_layer=4), "lacks transformer.h.3"),
        (gpt2, dict(n_positions=14), r"transformer.wpe.weight of shape \(13, 24\)"),
        (gpt2, dict(tie_word_embeddings=False), "lacks lm_head.weight"),
        (gpt2, dict(quantization_config={"bits": 4}), "quantization_config"),
        (llama, dict(hidden_act="gelu"), "hidden_act=gelu"),
        (llama, dict(rope_parameters=SCALED), "rope_parameters"),
        (llama, dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling"),
        (llama, dict(attention_bias=True), "mlp_bias=False"),
        (llama, dict(head_dim=16), "head_dim=16"),
        (llama, dict(max_position_embeddings=None), "max_position_embeddings=None"),
        (llama, dict(tie_word_embeddings=True), "is not the embedding"),
        (qwen3, dict(head_dim=None), "head_dim=128"),
        (qwen3, dict(use_sliding_window=True), "use_sliding_window=True"),
        (qwen3, dict(layer_types=["sliding_attention"] * 3), "layer_types=sliding_attention"),
    ],
)
def test_what_our_model_does_not_compute_is_refused(build, values, message, tmp_path):
    folder = edit(saved(build(), tmp_path / "theirs"), **values)
    with pytest.raises(ValueError, match=message) as refused:
        import_checkpoint(folder, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["theirs"]


def test_settings_of_both_versions_of_transformers_are_read(tmp_path, tokens):
    folder = saved(llama(), tmp_path / "theirs")
    new = model_config(json.loads((folder / "config.json").read_text()))
    edit(folder, rope_parameters=None, rope_theta=500.0, head_dim=None)
    old = model_config(json.loads((folder / "config.json").read_text()) | {"rope_scaling": None})
    assert old == new and old.rope_theta == 500.0


def test_files_without_prefix_and_with_masks_are_read(tmp_path, tokens):
    """As those of the first GPT-2, with names of the bare model and the causal mask."""
    folder = saved(gpt2(), tmp_path / "theirs")
    reference = their_logits(folder, tokens)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, LENGTH, LENGTH)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    import_checkpoint(folder, tmp_path / "run")
    assert_close(logits(tmp_path / "run", tokens), reference)


class Trap:
    """A pickle that says when it is opened."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("where", ["alone", "in the index", "under another name"])
def test_a_pickle_is_never_opened(where, tmp_path):
    folder = saved(gpt2(), tmp_path / "theirs")
    (folder / "model.safetensors").unlink()
    name = "model.safetensors" if where == "under another name" else "pytorch_model.bin"
    (folder / name).write_bytes(pickle.dumps(Trap()))
    if where == "in the index":
        index = {"weight_map": {"transformer.wte.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = {"under another name": "not a safetensors file"}.get(where, "bin is a pickle")
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, tmp_path / "run")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = saved(gpt2(), tmp_path / "theirs")
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside of its folder"):
        import_checkpoint(folder, tmp_path / "run")


def test_an_import_may_begin_any_run_of_its_model(tmp_path):
    folder = saved(gpt2(), tmp_path / "theirs")
    step = import_checkpoint(folder, tmp_path / "run")
    with CheckpointReader(step) as reader:
        state = reader.manifest.state
        assert (reader.tensor("final_norm.weight", "exp_avg_sq") == 0).all()
    model = state.config.model
    run = Config(
        model=dataclasses.replace(model, dropout=0.1),
        optimizer=OptimizerConfig(lr=3e-4, weight_decay=0.0),
        data=DataConfig(order="megatron"),
    )
    given = dict(data_fingerprint={"train": 1}, tokenizer_sha256="a" * 64)
    assert refuse_other_run(state, run, **given) == []
    other = dataclasses.replace(run, model=dataclasses.replace(model, norm_eps=1e-3, seq_length=9))
    with pytest.raises(ValueError, match="seq_length: saved 13, asked 9; model.norm_eps"):
        refuse_other_run(state, other, **given)
    # From its first step on it is a run like any other.
    with pytest.raises(ValueError, match="optimizer.lr.*data:"):
        refuse_other_run(dataclasses.replace(state, step=1), run, **given)
    told = dataclasses.replace(state, tokenizer_sha256="b" * 64)
    with pytest.raises(ValueError, match="tokenizer: it is another one"):
        refuse_other_run(told, run, **given)


TEXT = "It is a truth universally acknowledged, that a single man  must be in want of a wife.\n"


def make_tokenizer_json(path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path))
    return path


SAMPLES = [TEXT, "  lead\n\n\tça va? 漢字 😀", "x" * 40, " ", "a\u00a0b\r\n", ""]


@pytest.mark.parametrize("style", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["json", "sentencepiece"])
def test_the_tokenizer_goes_along_and_gives_the_same_ids(kind, style, tmp_path):
    if kind == "json":
        path = make_tokenizer_json(tmp_path / "tokenizer.json")
    else:
        path = tmp_path / "tokenizer.model"
        train_sentencepiece(iter([TEXT]), path, vocab_size=300)
    ours = load_tokenizer(path)
    config = ModelConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=LENGTH, vocab_size=320,
        **OURS[style],
    )  # fmt: skip
    weights = {n: np.ones(s, np.float32) for n, s in parameter_shapes(config).items()}
    write_checkpoint(tmp_path / "run", config, weights)
    assert "with tokenizer" in export(
        tmp_path / "run", tmp_path / "theirs", tokenizer_path=str(path)
    )
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert theirs.eos_token_id == ours.eod
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").config.eos_token_id == ours.eod
    for text in SAMPLES:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text
    import_checkpoint(tmp_path / "theirs", tmp_path / "again")
    assert load(tmp_path / "again").tokenizer.encode(TEXT) == ours.encode(TEXT)
    assert_scored_alike(tmp_path, path)


def assert_scored_alike(folder, tokenizer):
    """An import scores a pair as the checkpoint does that it came from."""
    (folder / "text.txt").write_text(TEXT)
    run_verb("preprocess", "--input", folder / "text.txt", "--format", "text",
             "--output_prefix", folder / "pair", "--tokenizer", tokenizer)  # fmt: skip
    losses = {}
    for run in ("run", "again"):
        words = ("--checkpoint", folder / run, "--data", folder / "pair", "--tokenizer", tokenizer)
        run_verb("evaluate", *words, "--json", folder / f"{run}.json")
        losses[run] = json.loads((folder / f"{run}.json").read_text())["loss"]
    assert losses["run"] == losses["again"] > 0


def run_verb(name, *words):
    command = [sys.executable, "-m", "megagpt", name, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_without_like_stays_behind(tmp_path):
    assert tokenizer_files(load_tokenizer("byte"), model_max_length=8)[0] == {}
    texts = [TEXT + f"{n} {n * n}\n" for n in range(100)]
    unigram = tmp_path / "unigram.model"
    train_sentencepiece(iter(texts), unigram, vocab_size=310, model_type="unigram")
    prefixing = tmp_path / "prefixing.model"  # puts a space before the text, as Llama 2's
    with prefixing.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=310, model_type="bpe",
            normalization_rule_name="identity", byte_fallback=True,
            remove_extra_whitespaces=False, minloglevel=2,
        )  # fmt: skip
    for path in (unigram, prefixing):
        files, note = tokenizer_files(load_tokenizer(path), model_max_length=8)
        assert files == {} and "gives other ids" in note


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    our_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="has 257 tokens, the model 61"):
        export(tmp_path / "run", tmp_path / "theirs", tokenizer_path="byte")
    assert "without" in export(tmp_path / "run", tmp_path / "theirs", tokenizer_path="none")


def anonymous_bytes():
    """Memory of this process that no file stands behind."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def test_neither_way_holds_more_than_a_few_tensors(tmp_path, monkeypatch):
    for module in (shard_file, manifest, reader):
        monkeypatch.setattr(module, "BLOCK_BYTES", 1 << 18)  # two are kept of each file
    model = gpt2(n_embd=384, n_layer=6, vocab_size=2048, n_positions=64)
    model.save_pretrained(tmp_path / "theirs")
    sizes = [p.numel() * 4 for p in model.parameters()]
    total, largest = sum(sizes), max(sizes)
    assert total > 14 * largest
    samples = []
    write = ShardWriter.write

    def write_and_sample(self, values):
        write(self, values)
        samples.append(anonymous_bytes())

    monkeypatch.setattr(ShardWriter, "write", write_and_sample)
    before = anonymous_bytes()
    import_checkpoint(tmp_path / "theirs", tmp_path / "run")
    # A tensor as it is handed over, and what the allocator keeps of the ones before.
    assert max(samples) - before < 3 * largest < total / 4

    tracemalloc.start()  # of numpy's arrays too, which are all that an export in fp32 allocates
    try:
        export_checkpoint(tmp_path / "run", tmp_path / "back")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # One of theirs, one of ours, and blocks.
    assert peak < 2 * largest + (4 << 20) < total / 4
