"""The verbs of `megagpt`: a table of them, a file each, and the arguments that several share.

The file of a verb holds its arguments, one call of the library, and printing. It is imported when
its verb is asked for, so that `megagpt --help` starts at once; no other room imports any.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import keyword
import sys
from types import ModuleType
from typing import NoReturn

import megagpt
from megagpt.config.command import UsageError, run_command

VERBS = {
    "train": "Pretrains a GPT: on this process, or as one of the ranks of a launcher.",
    "tokenizer": "Trains a SentencePiece tokenizer on JSONL or plain text.",
    "preprocess": "Encodes JSONL or plain text into a Megatron .bin/.idx pair with its manifest.",
    "data": "Looks into training data: inspect, verify, merge, split, adopt, blend, locate.",
    "evaluate": "Loss, perplexity and bits per byte of a trained model on a split of its data.",
    "generate": "Continues a prompt with a trained model.",
    "export": "Writes a checkpoint as a folder that transformers opens, with its tokenizer.",
    "import": "Makes a run folder, with a checkpoint at step 0, of a model of transformers.",
    "checkpoint": "Looks into checkpoints: inspect, verify, diff, prune.",
    "parity": "Trains a run under two layouts and compares the losses and norms of each step.",
    "ops": "Compiles DeepSpeed's ops, the data pipeline's and the kernels', so that no run waits.",
    "demo": "From nothing to a trained, evaluated GPT on two CPU processes; needs the repository.",
}
"""What each verb does: the first line of its file."""


def command(*verb: str) -> NoReturn:
    """Runs the process as a verb, or without one as `megagpt`, whose arguments name it."""
    sys.exit(run_command(lambda arguments: main([*verb, *arguments])))


def main(arguments: list[str]) -> int | None:
    """Runs a verb, or tells which there are.

    Raises:
        UsageError: If there is no such verb.
    """
    for argument in arguments:
        if not _is_text(argument):
            raise UsageError(
                f"argument {ascii(argument)} is not UTF-8 text; convert it, or rename the file"
            )
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        width = max(map(len, VERBS))
        print("usage: megagpt VERB [--help] ...\n")
        print("\n".join(f"  {name:{width}}  {text}" for name, text in VERBS.items()))
        print("\non many processes: deepspeed launch/pretrain.py, with the flags of megagpt train")
        return 0
    if verb == "--version":
        print(f"megagpt {megagpt.__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "megagpt --help tells all"
        raise UsageError(f"unknown verb '{verb}'; {hint}")
    module = module_of(verb)
    if verb == "train":  # whose flags are the configuration's
        return module.pretrain(rest)
    parser = argparse.ArgumentParser(f"megagpt {verb}", description=module.__doc__)
    module.add_arguments(parser)
    options, rest = parser.parse_known_args(rest)
    if rest and "takes_rest" not in options:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for name, value in vars(options).items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UsageError(f"--{name}={value} does not fit into 64 bits; give a smaller number")
    options.rest = rest
    return module.main(options)


def _is_text(argument: str) -> bool:
    """Whether an argument's bytes were UTF-8; Python keeps others as lone surrogates."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def module_of(verb: str) -> ModuleType:
    """The file of a verb, with `add_arguments` and `main`."""
    # `import` cannot be a module's name.
    return importlib.import_module(f"{__name__}.{verb}{'_' * keyword.iskeyword(verb)}")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Which documents are read."""
    add = parser.add_argument
    kinds = ".jsonl (one document a line) or .txt (one a file), also as .gz or .zst; globs too"
    add("--input", nargs="+", required=True, metavar="FILE", help=kinds)
    add("--format", default="auto", choices=["auto", "jsonl", "text"])
    add("--json_key", default="text", help="key of the text in JSONL")


def add_error_arguments(parser: argparse.ArgumentParser) -> None:
    """What becomes of bad documents."""
    add = parser.add_argument
    means = "what a bad document does: stop the command, or be left out and counted"
    add("--on_error", default="fail", choices=["fail", "skip"], help=means)
    means = "with --on_error skip: share of bad documents above which the command fails"
    add("--largest_skipped_share", type=float, default=0.01, help=means)


def add_model_arguments(parser: argparse.ArgumentParser, *, without_tokenizer: str = "") -> None:
    """Which trained model is opened; without_tokenizer tells what takes the tokenizer's place."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="run folder or step_* folder")
    add("--tokenizer", help=f"default: that of the run's data{without_tokenizer}")
    add("--eod", metavar="TOKEN", help="what ends documents, where the run's data is not here")
