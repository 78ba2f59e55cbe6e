"""What this machine's processor computes natively."""


def cpu_computes_bf16() -> bool:
    """Whether oneDNN has bf16 kernels for this CPU (AVX-512 at least).

    Without them torch falls back to slow loops: on a machine with AVX2 only, a step of the demo
    took ten times as long in bf16 as in fp32.
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
