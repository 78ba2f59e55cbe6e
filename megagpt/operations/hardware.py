"""What this machine's processor computes natively."""


def cpu_computes_bf16() -> bool:
    """Whether oneDNN has bf16 kernels for this CPU (AVX-512 at least).

    Without them torch falls back to plain loops: on an AVX2 machine a step of the demo took 60 times
    as long as in bf16 on one with AMX, and products an eighth of the speed of its own fp32.
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
