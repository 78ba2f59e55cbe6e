"""The commands that README and docs show: scripts, flags, files and make targets exist."""

import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

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
def flags_of(program: str, *subcommand: str) -> set[str]:
    """Long flags in the help of a script or installed program, or of a command of it."""
    path = ROOT / program
    words = [sys.executable, str(path)] if path.is_file() else [installed(program)]
    done = subprocess.run(
        [*words, *subcommand, "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", done.stdout))


def installed(program: str) -> str:
    path = Path(sys.executable).parent / Path(program).name
    assert path.is_file(), f"{program} is not installed"
    return str(path)


def flags_in(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@pytest.mark.parametrize("command", commands())
def test_command_exists_and_takes_its_flags(command, tmp_path, monkeypatch):
    program = Path(command[0]).name
    scripts = [word for word in command if word.endswith(".py")]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(command[1:]) <= set(targets)
        return
    if program == "pip":
        installed("pip")
        return
    if program == "pkill":
        return  # tried by tests/distributed/test_training.py
    if not scripts:
        assert set(flags_in(command[1:])) <= flags_of(program)
        return
    script = command.index(scripts[0])
    assert (ROOT / scripts[0]).is_file()
    if program not in ("python", "python3"):
        launcher_flags = {f.replace("-", "_") for f in flags_in(command[1:script])}
        assert launcher_flags <= {f.replace("-", "_") for f in flags_of(program)}
    arguments = command[script + 1 :]
    if "--" in arguments:  # what follows is a run
        end = arguments.index("--")
        assert set(flags_in(arguments[:end])) <= flags_of(scripts[0])
        arguments = arguments[end + 1 :]
    elif scripts[0] != "launch/pretrain.py":
        has_commands = scripts[0] in ("tools/data.py", "tools/checkpoint.py")
        subcommand = arguments[:1] if has_commands else []
        assert set(flags_in(arguments)) <= flags_of(scripts[0], *subcommand)
        return
    # Settings are parsed for real; run.yaml stands for the reader's own file.
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
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import demo
    finally:
        sys.path.remove(str(ROOT / "tools"))
    words = [str(word) for word in demo.train_command()]
    script = words.index("launch/pretrain.py")
    config, _, _ = parse_config(words[script + 1 :])
    assert config.output_dir == str(demo.RUN)
    assert config.data.test_path == str(demo.DATA / "test")
