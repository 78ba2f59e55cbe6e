"""Folders of transformers: the same logits both ways, the same bytes after a round trip."""

import dataclasses
import json
import pickle
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from hf_models import (
    LENGTH,
    MODELS,
    OURS,
    assert_close,
    gpt2,
    logits,
    our_checkpoint,
    saved,
    their_logits,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megagpt.checkpoint.format import manifest, reader, shard_file
from megagpt.checkpoint.format.manifest import weights_file
from megagpt.checkpoint.format.reader import CheckpointReader, verify_checkpoint
from megagpt.checkpoint.format.shard_file import ShardWriter
from megagpt.checkpoint.huggingface.convert import export_checkpoint, import_checkpoint
from megagpt.checkpoint.huggingface.names import parameter_shapes
from megagpt.checkpoint.same_run import refuse_other_run
from megagpt.checkpoint.weights import load_weights
from megagpt.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", MODELS)
def test_a_weight_that_is_not_finite_is_named(name, value, tmp_path):
    theirs = saved(MODELS[name](), tmp_path / "theirs")
    path = theirs / "model.safetensors"
    weights = load_file(path)
    for tensor in weights:
        damaged = {key: each.clone() for key, each in weights.items()}
        damaged[tensor].view(-1)[-1] = value
        save_file(damaged, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="not finite|tie") as error:
            import_checkpoint(theirs, tmp_path / "run")
        assert tensor in str(error.value)
        assert not (tmp_path / "run").exists()


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
