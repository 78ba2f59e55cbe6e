"""The command from a built wheel, away from the repository: text to a model that writes."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import megagpt
from megagpt.operations.prebuild import extensions_root

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
RUN = [
    *"train --data.path text --data.split 8,1,1 --output_dir run".split(),
    *"--model.num_layers 1 --model.hidden_size 32 --model.num_attention_heads 2".split(),
    *"--model.seq_length 32 --batch.micro_batch_size 2 --batch.global_batch_size 4".split(),
    *"--training.precision fp32 --training.train_steps 3".split(),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an environment `venv`: the wheel, and by a path file torch and the like."""
    place = tmp_path_factory.mktemp("away")
    source = place / "source"  # setuptools writes beside what it packs
    shutil.copytree(ROOT / "megagpt", source / "megagpt")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(place)]
    check(place, *pip, *build, str(source))
    shutil.rmtree(source)
    venv = place / "venv"
    check(place, sys.executable, "-m", "venv", "--without-pip", str(venv))
    paths = {"base": str(venv), "platbase": str(venv)}
    borrowed = Path(sysconfig.get_path("purelib", "venv", paths)) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    install = ["--python", str(venv / "bin/python"), "install", "--no-deps", "--no-index"]
    check(place, *pip, *install, *map(str, place.glob("*.whl")))
    # A cache of its own, so that native.cpp is compiled; DeepSpeed's ops are those of make ops.
    (place / "cache").mkdir()
    (place / "cache/torch_extensions").symlink_to(extensions_root())
    return place


def run(place, *command):
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        command, cwd=place, env=environment, capture_output=True, text=True, timeout=600
    )


def check(place, *command):
    done = run(place, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_text_to_a_model_that_writes(place):
    command = str(place / "venv/bin/megagpt")
    assert check(place, command, "--version") == f"megagpt {megagpt.__version__}\n"
    python = str(place / "venv/bin/python")
    where = check(place, python, "-c", "import megagpt; print(megagpt.__file__)")
    assert Path(where.strip()).is_relative_to(place / "venv")
    documents = (ROOT / "LICENSE").read_text().split("\n\n") * 4
    lines = [json.dumps({"text": text}) + "\n" for text in documents]
    (place / "text.jsonl").write_text("".join(lines))
    encode = "preprocess --input text.jsonl --output_prefix text --tokenizer byte"
    check(place, command, *encode.split())
    check(place, command, *RUN)
    evaluated = check(place, command, "evaluate", "--checkpoint", "run", "--split", "valid")
    assert "step=3\n" in evaluated and "bits_per_byte=" in evaluated
    generate = "generate --checkpoint run --prompt Permission --max_new_tokens 5"
    assert check(place, command, *generate.split()).startswith("Permission")
    for library in ("data", "attention", "linear_cross_entropy"):
        assert list((place / "cache/megagpt").glob(f"{library}_native_*.so"))
    layouts = "parity --a zero1 --b zero2 --steps 1 --".split()
    settings = RUN[1 : RUN.index("--output_dir")] + RUN[RUN.index("run") + 1 :]
    assert "equal: tolerances" in check(place, command, *layouts, *settings)


@pytest.mark.parametrize(
    ("verb", "line"),
    [
        ("demo", "error: megagpt demo needs launch/demo.yaml of the repository"),
        ("train", "error: no data is named; give --data.path"),  # here the demo's is the default
    ],
)
def test_what_needs_the_repository_says_so_in_one_line(verb, line, place):
    done = run(place, str(place / "venv/bin/megagpt"), verb)
    assert done.returncode == 1
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
