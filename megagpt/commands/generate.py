"""Continues a prompt with a trained model."""

from __future__ import annotations

import argparse

from megagpt.commands import add_model_arguments
from megagpt.inference.generate import Sampling, generate
from megagpt.inference.load import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    add_model_arguments(parser)
    add = parser.add_argument
    add("--prompt", default="", help="text to continue; empty starts a document")
    add("--max_new_tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--top_k", type=int, default=0, help="0 is all tokens")
    add("--top_p", type=float, default=0.95, help="1 is all tokens")
    add("--greedy", action="store_true", help="always the likeliest token")
    add("--seed", type=int, default=1234)
    add("--num_samples", type=int, default=1)


def main(options: argparse.Namespace) -> None:
    """Prints the samples, each with its prompt."""
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
    loaded = load(options.checkpoint, tokenizer_path=options.tokenizer, eod=options.eod)
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
        document_masking=loaded.config.data.document_masking,
    )
    for number, sample in enumerate(samples, 1):
        if len(samples) > 1:
            print(f"--- sample {number}")
        print(tokenizer.decode(prompt + sample))
