"""Continues a prompt: greedy, or sampled with temperature, top-k and top-p, with a KV cache.

Knows tokens only; `megagpt generate` turns text into them and back.
"""

# b samples, s tokens so far, v vocabulary

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megagpt.model.attention import KVCache
from megagpt.model.gpt import GPTModel

_GREEDY_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; temperature first, then top_k, then top_p."""

    temperature: float = 1.0
    """Divides the logits; 0, and what is as good as 0, is greedy."""
    top_k: int = 0
    """Only this many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""

    def __post_init__(self) -> None:
        """Checks ranges."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(
                f"temperature={self.temperature} must be 0 or more; give 0 for the likeliest token"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is negative; give 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]; give 1 for all tokens")


def next_token_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The distribution that the next token is drawn from.

    Args:
        logits: [b, v], float32. Not modified.
        sampling: Greedy gives 1 to the likeliest token, the first of equals.

    Returns:
        [b, v], float32, each row sums to 1.

    Source: top-p is Holtzman et al. 2020, https://arxiv.org/abs/1904.09751, section 3.1; the token
    that crosses top_p is kept, so at least one is.
    """
    if logits.isfinite().logical_not().any():
        raise ValueError(
            "the model gives logits that are not finite (NaN or infinity), so its weights are not "
            "or overflow; take an older checkpoint (megagpt checkpoint inspect)"
        )
    # Below this the likeliest token has all of the probability, and the quotient overflows.
    if sampling.temperature < _GREEDY_TEMPERATURE:
        likeliest = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, likeliest, 1.0)
    probabilities = (logits / sampling.temperature).softmax(dim=-1)
    # Ranked rather than compared with a threshold, so that ties never keep more than top_k.
    ranked, tokens = probabilities.sort(dim=-1, descending=True, stable=True)  # [b, v]
    if 0 < sampling.top_k < logits.shape[-1]:
        ranked[..., sampling.top_k :] = 0
        ranked /= ranked.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        before = ranked.cumsum(dim=-1) - ranked
        ranked[before >= sampling.top_p] = 0
        ranked /= ranked.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, tokens, ranked)


@torch.no_grad()
def generate(
    model: GPTModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eod: int,
    seed: int = 0,
    num_samples: int = 1,
    num_tokens: int | None = None,
    document_masking: bool = False,
) -> list[list[int]]:
    """Samples continuations of a prompt.

    A text that outgrows seq_length goes on with its last seq_length // 2 tokens as context.

    Args:
        model: Whole, at tp = 1.
        prompt: Token ids; an empty one starts a document, after an end of document.
        max_new_tokens: Largest number of tokens after the prompt.
        sampling: How tokens are drawn.
        eod: A sample stops at this token, which is left out.
        seed: The same seed gives the same samples.
        num_samples: Continuations of the one prompt.
        document_masking: Whether the model was trained to see nothing before a document, not even
            the end of document that an empty prompt stands for.
        num_tokens: Only ids below this are drawn; default the model's vocabulary.

    Returns:
        For each sample its new token ids.

    Raises:
        ValueError: If a count is below 1 or a token is outside the vocabulary.
    """
    for name, count in (("max_new_tokens", max_new_tokens), ("num_samples", num_samples)):
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1; give a positive number")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed={seed} does not fit into 64 bits; give a smaller number")
    vocab_size = model.lm_head.vocabulary.size
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"token {token} is outside the vocabulary of {vocab_size}; encode the prompt with "
                "the model's tokenizer"
            )
    device = next(model.parameters()).device
    seq_length = model.config.seq_length
    # Drawn on the CPU, so that a seed means the same on every device.
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt) or [eod]] * num_samples, device=device)  # [b, s]
    new_tokens: list[list[int]] = [[] for _ in range(num_samples)]
    running = set(range(num_samples))
    cache: KVCache | None = None
    window_start, num_cached = 0, 0
    for number in range(max_new_tokens):
        end = tokens.shape[1]
        if end - window_start > seq_length:
            window_start, cache = end - max(1, seq_length // 2), None
        if cache is None:
            cache, num_cached = KVCache(model.config.num_layers), window_start
        last = model.logits(tokens[:, num_cached:], cache)[:, -1, :num_tokens].cpu()  # [b, v]
        num_cached = end
        drawn = torch.multinomial(
            next_token_probabilities(last, sampling), 1, generator=generator
        )  # [b, 1]
        for sample in sorted(running):
            token = int(drawn[sample, 0])
            if token == eod:
                running.discard(sample)
            else:
                new_tokens[sample].append(token)
        if not running:
            break
        tokens = torch.cat([tokens, drawn.to(device)], dim=1)
        if document_masking and not prompt and number == 0:
            tokens, cache = tokens[:, 1:], None
    return new_tokens
