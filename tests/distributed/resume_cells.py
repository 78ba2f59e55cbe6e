"""What the resume tests train: cells of layout, precision and model, on ranks that start once."""

import os
import signal
from pathlib import Path

from megagpt.config.command_line import parse_config
from megagpt.config.layout import Layout
from megagpt.testing.corpus import byte_corpus
from megagpt.testing.distributed import DEVICE

ROOT = Path(__file__).resolve().parents[2]
MODELS = {
    "gpt2": (),
    "llama": (
        *("--model.normalization", "rmsnorm", "--model.position_embedding", "rope"),
        *("--model.activation", "swiglu", "--model.bias", "false"),
        *("--model.tie_embeddings", "false", "--model.num_kv_heads", "2"),
    ),
}
# So small a model would stay in memory otherwise, whatever the JSON says.
WIDE = ("--model.hidden_size", "256", "--model.num_layers", "2")


def prepare_data(directory):
    """This repository's licence as bytes; returns the prefix."""
    words = (ROOT / "LICENSE").read_text().split()
    return byte_corpus(
        directory, (" ".join(words[i : i + 5 + i % 40]) for i in range(0, len(words), 3))
    )


def prepare(
    rank, layout_name, data, output_dir, *, steps, model="gpt2", precision="fp32", extra=(), keys=()
):
    """The prepared run of one cell; keys are of the DeepSpeed JSON, beyond those of the layout."""
    from megagpt.training.run import prepare_run, resolve_run

    layout = Layout.parse(layout_name)
    arguments = [
        *"--model.num_layers 4 --model.hidden_size 32 --model.num_attention_heads 4".split(),
        *"--model.seq_length 32 --model.vocab_padding_multiple 8".split(),
        *"--batch.micro_batch_size 1 --batch.global_batch_size 8".split(),
        *"--optimizer.lr 1e-3 --optimizer.warmup_steps 3 --optimizer.decay_steps 40".split(),
        *"--training.eval_interval 0 --checkpoint.save_interval 0".split(),
        *("--training.train_steps", str(steps), "--training.precision", precision),
        *("--data.path", str(data), "--data.split", "8,1,1", "--output_dir", str(output_dir)),
        *MODELS[model],
        *(WIDE if "nvme" in layout_name else ()),
        *layout.arguments(),
        *extra,
    ]
    config, _, sources = parse_config(arguments)
    resolved = resolve_run(
        config,
        layout.ds_config() | dict(keys),
        sources=sources,
        world_size=layout.world_size,
        device=DEVICE,
    )
    return prepare_run(resolved, rank=rank)


def train(rank, *arguments, stop_after=None, **options):
    """One run; (loss, gradient norm) of each step, until the end or for stop_after steps."""
    from megagpt.training.loop import loop
    from megagpt.training.start import start

    curve = []

    def on_step(result):
        curve.append((result.loss, result.grad_norm))
        return len(curve) == stop_after

    with start(prepare(rank, *arguments, **options)) as session:
        loop(session, on_step)
    return curve


def kill_self():
    """What the kernel or a scheduler would do: nothing of Python runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)
