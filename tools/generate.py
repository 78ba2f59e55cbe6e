"""Continues a prompt with a trained model."""

from __future__ import annotations

import argparse
import sys

from megagpt.config.command import run_command
from megagpt.inference.generate import Sampling, generate
from megagpt.inference.load import load


def main(arguments: list[str]) -> int:
    """Parses the command line and prints the samples, each with its prompt."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="run folder or step_* folder")
    parser.add_argument("--prompt", default="", help="text to continue; empty starts a document")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top_k", type=int, default=0, help="0 is all tokens")
    parser.add_argument("--top_p", type=float, default=0.95, help="1 is all tokens")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--tokenizer", help="default: that of the run's data")
    options = parser.parse_args(arguments)
    if options.greedy and options.num_samples > 1:
        raise ValueError(
            f"num_samples={options.num_samples} with --greedy gives the same text each time; "
            "leave one of them out"
        )
    sampling = Sampling(
        temperature=0.0 if options.greedy else options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    loaded = load(options.checkpoint, tokenizer_path=options.tokenizer)
    tokenizer = loaded.tokenizer
    prompt = tokenizer.encode(options.prompt)
    samples = generate(
        loaded.model,
        prompt,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        eod=tokenizer.eod,
        seed=options.seed,
        num_samples=options.num_samples,
        num_tokens=tokenizer.vocab_size,
    )
    for number, sample in enumerate(samples, 1):
        if len(samples) > 1:
            print(f"--- sample {number}")
        print(tokenizer.decode(prompt + sample))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
