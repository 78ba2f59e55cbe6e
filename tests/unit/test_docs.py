"""The commands that README and docs show: verbs, scripts, flags, files and make targets exist."""

import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from megagpt.commands import demo
from megagpt.config.command_line import parse_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands():
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip() and not line.startswith("#"):
                    yield pytest.param(
                        shlex.split(line), id=f"{page.name}:{line[:60]}".replace(" ", "_")
                    )


@lru_cache
def flags_of(program: str, *words: str) -> set[str]:
    """Long flags in the help of a program: installed, Python with a script, a verb of megagpt."""
    ours = {"megagpt": [sys.executable, "-m", "megagpt"], "python": [sys.executable]}
    command = ours.get(program) or [installed(program)]
    done = subprocess.run(
        [*command, *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", done.stdout))


def installed(program: str) -> str:
    path = Path(sys.executable).parent / program
    assert path.is_file(), f"{program} is not installed"
    return str(path)


def flags_in(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("command", commands())
def test_command_exists_and_takes_its_flags(command, tmp_path, monkeypatch):
    program, words = Path(command[0]).name, command[1:]
    scripts = [word for word in words if word.endswith(".py")]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "pip":
        installed("pip")
    elif program == "pkill":
        pass  # tried by tests/distributed/test_launch.py
    elif program == "megagpt":
        verb, arguments = words[0], words[1:]
        if verb == "parity":
            end = arguments.index("--")
            assert set(flags_in(arguments[:end])) <= flags_of(program, verb)
            verb, arguments = "train", arguments[end + 1 :]  # what follows is a run
        if verb == "train":
            parse(arguments, tmp_path, monkeypatch)
        else:
            below = arguments[:1] if verb in ("data", "checkpoint", "demo") else []
            assert set(flags_in(arguments)) <= flags_of(program, verb, *below)
    elif program == "python":
        assert words[0].startswith("benchmarks/")  # the rest are verbs
        assert set(flags_in(words)) <= flags_of(program, words[0])
    elif scripts:
        assert scripts == ["launch/pretrain.py"]
        script = words.index(scripts[0])
        launcher_flags = {f.replace("-", "_") for f in flags_in(words[:script])}
        assert launcher_flags <= {f.replace("-", "_") for f in flags_of(program)}
        parse(words[script + 1 :], tmp_path, monkeypatch)
    else:
        assert set(flags_in(words)) <= flags_of(program)


def parse(arguments, tmp_path, monkeypatch):
    """Settings are parsed for real; run.yaml stands for the reader's own file."""
    monkeypatch.chdir(ROOT)
    own = tmp_path / "run.yaml"
    own.write_text("model: {num_layers: 2}\n")
    parse_config([str(own) if word == "run.yaml" else word for word in arguments])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_demo_prints_commands_that_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = demo.training()
    config, _, _ = parse_config(arguments)
    assert script == "launch/pretrain.py"
    assert config.output_dir == str(demo.RUN)
    assert config.data.test_path == str(demo.DATA / "test")
