"""`megagpt parity` on real runs: equal layouts, a tolerance that is not met, bad names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.testing.corpus import byte_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The flags of a tiny run on this repository's licence, as bytes."""
    data = byte_corpus(tmp_path_factory.mktemp("data"), [(ROOT / "LICENSE").read_text()])
    return [
        *("--data.path", str(data), "--data.split", "1,0,0"),
        *"--model.num_layers 2 --model.hidden_size 32 --model.num_attention_heads 4".split(),
        *"--model.seq_length 32 --batch.micro_batch_size 1 --batch.global_batch_size 4".split(),
        *"--training.precision fp32 --training.train_steps 5".split(),
    ]


def verify(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "megagpt", "parity", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_equal_layouts_give_a_table_and_exit_0(run):
    done = verify("--a", "zero0", "--b", "tp2-sp-zero1", "--steps", "3", "--", *run)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" +\d", line)]
    assert [row[0] for row in rows] == ["1", "2", "3"]
    for _, a, b, loss_difference, _, _, norm_difference in rows:
        assert a[:7] == b[:7] and 5 < float(a) < 6  # log 257 = 5.55
        assert float(loss_difference) <= 2e-6 and float(norm_difference) <= 1e-4
    assert done.stdout.splitlines()[-1].startswith("equal: tolerances loss 2e-06")


@pytest.mark.slow
def test_a_difference_beyond_the_tolerance_exits_1(run):
    done = verify(
        *("--a", "zero0", "--b", "tp2-zero0", "--steps", "5"),
        # Bit for bit: one number may be so by chance, ten are not.
        *("--loss_tolerance", "0", "--grad_norm_tolerance", "0", "--", *run),
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("DIFFERENT")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--a", "dp2-zero1"], "--b LAYOUT"),
        (["--a", "dp2", "--b", "xx2", "--steps", "2"], "'xx2' in layout 'xx2' is no word"),
        (["--a", "dp2", "--b", "tp2", "--steps", "9"], "more than the run's train_steps=5"),
        (["--a", "dp2", "--b", "tp2", "--steps", "0"], "--steps=0 must be at least 1"),
    ],
)
def test_a_wrong_request_is_one_line(run, arguments, words):
    done = verify(*arguments, "--", *run)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_layout_that_is_refused_is_named_with_its_reason(run):
    done = verify("--a", "pp2-zero2", "--b", "zero0", "--steps", "2", "--", *run)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: layout pp2-zero2 does not run: ") and "set stage 1" in line
