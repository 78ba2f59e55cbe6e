"""A run whose steps are not finite any more ends with exit code 3 and leaves what was good."""

import json
import os
import subprocess
import sys

import pytest
import resume_cells

from megagpt.checkpoint.weights import load_weights
from megagpt.config.layout import Layout

# After the next update every weight is past what a forward pass can bear.
LOST = ("--optimizer.lr", "1e30", "--checkpoint.override", "[optimizer.lr]")


def pretrain(root, data, layout, precision, *arguments):
    """One process; (exit code, output)."""
    ds_config = root / "ds.json"
    ds_config.write_text(json.dumps(Layout.parse(layout).ds_config()))
    command = [
        *(sys.executable, "launch/pretrain.py", "--ds_config", str(ds_config)),
        *"--model.num_layers 2 --model.hidden_size 32 --model.num_attention_heads 4".split(),
        *"--model.seq_length 32 --batch.micro_batch_size 2 --batch.global_batch_size 4".split(),
        *"--optimizer.warmup_steps 1 --optimizer.decay_steps 40 --training.eval_interval 0".split(),
        *"--training.max_nonfinite_steps 3 --training.train_steps 20".split(),
        *"--checkpoint.save_interval 1 --checkpoint.keep_last 1".split(),
        *("--training.precision", precision, "--data.path", str(data), "--data.split", "8,1,1"),
        *("--output_dir", str(root / "run"), *arguments),
    ]
    done = subprocess.run(
        command,
        cwd=resume_cells.ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "layout, precision",
    [
        ("zero0", "fp32"),
        *(pytest.param(f"zero{n}", "bf16", marks=pytest.mark.slow) for n in (2, 3)),
    ],
)
def test_a_lost_run_ends_with_3_and_its_last_good_checkpoint_stays(layout, precision, tmp_path):
    data = resume_cells.prepare_data(tmp_path)
    code, output = pretrain(tmp_path, data, layout, precision, "--training.exit_step", "4")
    assert code == 0, output
    code, output = pretrain(tmp_path, data, layout, precision, "--checkpoint.load", "auto", *LOST)
    assert code == 3, output
    # Step 5 gave finite figures and spoilt the weights; 6 to 8 were not finite.
    assert "no checkpoint at iteration 5: not all of its weights are finite" in output
    told = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "in steps 6 to 8" in told[0] and "step_00000004" in told[0]
    assert "Traceback" not in output
    checkpoints = tmp_path / "run/checkpoints"
    assert [path.name for path in checkpoints.glob("step_*")] == ["step_00000004"]
    assert all(weight.isfinite().all() for weight in load_weights(checkpoints.parent)[1].values())
