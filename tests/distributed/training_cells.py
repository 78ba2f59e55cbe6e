"""A small real run, for tests that train many of them on ranks that are started once."""

from pathlib import Path

from megagpt.testing.corpus import byte_corpus

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def prepare_data(directory):
    """Real text (this repository's licence) through the real tool, as bytes."""
    words = (ROOT / "LICENSE").read_text().split()
    documents = [" ".join(words[i : i + 60]) for i in range(0, len(words), 4)]
    (directory / "other").mkdir()
    byte_corpus(directory / "other", documents[::-3])
    return byte_corpus(directory, documents)


def train(
    rank,
    world_size,
    data,
    output_dir,
    zero,
    precision,
    steps=STEPS,
    exit_step=None,
    load="none",
    extra=(),
):
    """One run in this process; returns (loss, gradient norm) of each step."""
    from megagpt.config.command_line import parse_config
    from megagpt.training.loop import loop
    from megagpt.training.run import prepare_run, resolve_run
    from megagpt.training.start import start

    arguments = [
        "--ds_config", str(ROOT / f"ds_configs/{zero}.json"),
        "--model.num_layers", "2", "--model.hidden_size", "32", "--model.num_attention_heads", "4",
        "--model.seq_length", "48", "--model.vocab_padding_multiple", "8",
        "--batch.micro_batch_size", "2", "--batch.global_batch_size", "8",
        "--optimizer.lr", "1e-3", "--optimizer.warmup_steps", "4", "--optimizer.clip_grad", "1.0",
        "--training.train_steps", str(steps), "--training.precision", precision,
        "--training.eval_interval", "10", "--checkpoint.save_interval", "0",
        "--checkpoint.load", load, "--data.path", str(data), "--data.split", "8,1,1",
        "--output_dir", str(output_dir),
    ]  # fmt: skip
    if exit_step is not None:
        arguments += ["--training.exit_step", str(exit_step)]
    arguments += extra
    config, ds_config, sources = parse_config(arguments)
    resolved = resolve_run(config, ds_config, sources=sources, world_size=world_size, device="cpu")
    run = prepare_run(resolved, rank=rank)
    curve = []
    with start(run) as session:
        loop(session, lambda result: curve.append((result.loss, result.grad_norm)))
    return curve
