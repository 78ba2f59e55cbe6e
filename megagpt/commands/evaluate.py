"""Loss, perplexity and bits per byte of a trained model on a split of its data."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from megagpt.commands import add_model_arguments
from megagpt.config.command import UsageError
from megagpt.config.schema import DataConfig
from megagpt.data.preprocessing.progress import report_to_stderr
from megagpt.files import write_json
from megagpt.inference.evaluate import evaluate, read_split, validate
from megagpt.inference.load import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--split", help="train, valid, valid-NAME or test, which is the default")
    add("--data", metavar="PREFIX", help="all of another pair, not the run's data")
    means = "the windows of the run's own validation, and its loss; of valid by default"
    add("--as_validation", action="store_true", help=means)
    add("--json", type=Path, metavar="FILE", help="write the result here too")
    add("--stride", type=int, help="tokens between windows; default seq_length / 2")
    add("--batch_size", type=int, default=8, help="windows in one forward pass")


def main(options: argparse.Namespace) -> None:
    """Evaluates, prints and writes the result."""
    if options.batch_size < 1:
        raise ValueError(f"batch_size={options.batch_size} must be at least 1; give more")
    if options.as_validation and (options.data or options.stride is not None):
        raise UsageError(
            "--as_validation takes the run's data and windows; leave --data and --stride out"
        )
    if options.data and options.split:
        raise UsageError(
            f"--data {options.data} is scored whole and --split={options.split} divides the run's "
            "data; leave one of them out"
        )
    begin = time.monotonic()
    loaded = load(options.checkpoint, tokenizer_path=options.tokenizer, eod=options.eod)
    half = max(1, loaded.config.model.seq_length // 2)
    stride = half if options.stride is None else options.stride
    trained_on = loaded.config.data
    if options.as_validation:
        split, stride = options.split or "valid", loaded.config.model.seq_length
        evaluation = validate(
            loaded.model,
            loaded.config,
            split,
            eod=loaded.tokenizer.eod,
            batch_size=options.batch_size,
            report=report_to_stderr,
        )
    else:
        data, split = trained_on, options.split or "test"
        if options.data:
            data = DataConfig(train_path=options.data, test_path=options.data)
        tokens, text_bytes = read_split(data, split, loaded.tokenizer)
        evaluation = evaluate(
            loaded.model,
            tokens,
            text_bytes,
            eod=loaded.tokenizer.eod,
            stride=stride,
            batch_size=options.batch_size,
            seen=trained_on,
            report=report_to_stderr,
        )
    result = {
        "checkpoint": options.checkpoint,
        "step": loaded.step,
        "split": options.data or split,
        "stride": stride,
        **dataclasses.asdict(evaluation),
        "seconds": time.monotonic() - begin,
    }
    for key, value in result.items():
        if value is None:
            continue
        print(f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, result)
