"""Where DeepSpeed's fused Adam cannot be compiled, torch's gives the same run and resume."""

import pytest
import resume_cells
import torch

from megagpt.testing.distributed import run_distributed


def train(rank, world_size, layout, precision, data, root):
    """Losses and norms by DeepSpeed's Adam, by torch's, and by torch's after a resume."""
    from megagpt.training import engine

    def curve(name, compiles, *, steps, extra=()):
        engine._compiles_fused_adam = lambda: compiles
        options = {"steps": 6, "precision": precision, "stop_after": steps, "extra": extra}
        return resume_cells.train(rank, layout, data, root / name, **options)

    deepspeeds = curve("deepspeed", True, steps=6)
    whole = curve("torch", False, steps=6)
    save = ("--training.exit_step", "3")
    first = curve("again", False, steps=None, extra=save)
    rest = curve("again", False, steps=3, extra=("--checkpoint.load", "auto"))
    return deepspeeds, whole, first + rest


@pytest.mark.parametrize(("layout", "precision"), [("dp2-zero0", "fp32"), ("dp2-zero1", "bf16")])
def test_torchs_adam_trains_and_resumes_alike(layout, precision, tmp_path):
    data = resume_cells.prepare_data(tmp_path)
    deepspeeds, whole, resumed = run_distributed(train, 2, layout, precision, data, tmp_path)[0]
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    torch.testing.assert_close(
        torch.tensor(whole), torch.tensor(deepspeeds), rtol=tolerance, atol=tolerance
    )
    assert resumed == whole  # to the last bit
