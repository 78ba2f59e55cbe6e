"""Nothing in the model leaves the GPU or makes the host wait for it, forward and backward."""

from itertools import product, starmap

import pytest
import torch
from fake_model import (
    STYLES,
    Case,
    attention_of_inference,
    attention_of_training,
    build_for_training,
    traffic_of_generation,
)

from megagpt.inference.generate import Sampling

HALF = (torch.bfloat16, torch.float16)
FLAGS = (False, True)
RECOMPUTE = ("none", "selective", "full")
CASES = [
    *starmap(
        Case,
        product(("gpt2", "llama_grouped"), (*HALF, torch.float32), RECOMPUTE, FLAGS, FLAGS, FLAGS),
    ),
    # The other heads, tied and not.
    *starmap(
        Case, product(("gpt2_grouped_untied", "llama_tied"), (torch.bfloat16,), RECOMPUTE, FLAGS)
    ),
    # Split; 8 ranks share 4 or 2 key/value heads.
    *(
        Case(style, torch.bfloat16, "none", masked, True, True, tp, sequence_parallel)
        for style, masked, tp, sequence_parallel in product(STYLES, FLAGS, (2, 8), FLAGS)
    ),
]


def kernel(case):
    """What torch's CUDA build takes, see `guard.cpp`."""
    if case.dtype in HALF:
        return {"varlen" if case.masked else "flash"}
    return {"efficient"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_stays_on_the_device(case, on_fake_cuda):
    assert on_fake_cuda(attention_of_training, case) == kernel(case)


@pytest.mark.parametrize("style", STYLES)
def test_a_model_is_built_and_filled_on_the_device(style, on_fake_cuda):
    assert on_fake_cuda(build_for_training, style, torch.bfloat16) == {"cuda torch.bfloat16"}


@pytest.mark.parametrize("dtype", (*HALF, torch.float32), ids=str)
@pytest.mark.parametrize("style", STYLES)
def test_inference_stays_on_the_device(style, dtype, on_fake_cuda):
    on_fake_cuda(attention_of_inference, style, dtype)


@pytest.mark.parametrize(
    "sampling", (Sampling(temperature=0.0), Sampling(top_k=5, top_p=0.9)), ids=str
)
def test_generation_reads_the_device_once_a_token(sampling, on_fake_cuda):
    prompt, *moves = on_fake_cuda(traffic_of_generation, sampling)
    assert prompt == ("cuda", (2, 2))
    # Logits of the last position to the host, where tokens are drawn, and the tokens back.
    assert moves == [("cpu", (2, 1000)), ("cuda", (2, 1))] * 3
