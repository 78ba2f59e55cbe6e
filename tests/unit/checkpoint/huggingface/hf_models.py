"""Small models of transformers and of ours, their folders and what they say."""

import json

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megagpt.checkpoint.directory import step_directory
from megagpt.checkpoint.format.manifest import (
    CheckpointManifest,
    CheckpointState,
    Layout,
    optimizer_file,
    weights_file,
    write_manifest,
)
from megagpt.checkpoint.format.pieces import Piece, TensorRecord
from megagpt.checkpoint.format.shard_file import ShardWriter
from megagpt.checkpoint.format.slices import Slice
from megagpt.checkpoint.huggingface.names import parameter_shapes
from megagpt.checkpoint.weights import load_weights
from megagpt.config.schema import Config, ModelConfig
from megagpt.inference.load import build_model

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
    return build_model(state.config, weights).logits(tokens)


def their_logits(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def assert_close(ours, theirs):
    # fp32 sums of at most 40 terms in another order, over three layers.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


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
        records[name] = TensorRecord.of(weights[name].shape, parts)
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
