"""`megagpt`: its map, its verbs beside their parsers, and the scripts that lead to them."""

import importlib
import keyword
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import megagpt
from megagpt.commands import VERBS, main, module_of
from megagpt.config.command import UsageError

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted([*(ROOT / "tools").glob("*.py"), ROOT / "launch/pretrain.py"])


def help_of(run, capsys):
    """What --help of something prints."""
    with pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_file_is_a_verb_and_every_verb_a_file():
    folder = Path(megagpt.__file__).parent / "commands"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {verb + "_" * keyword.iskeyword(verb) for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_the_table_says_what_the_verb_says(verb, capsys):
    assert module_of(verb).__doc__.splitlines()[0] == VERBS[verb]
    shown = help_of(lambda: main([verb, "--help"]), capsys)
    assert shown.startswith(f"usage: megagpt {verb} [")
    if verb != "train":  # which tells the precedence of its settings
        assert VERBS[verb] in " ".join(shown.split())


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_the_map_tells_every_verb(arguments, capsys):
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb, text in VERBS.items():
        assert any(re.fullmatch(rf"  {verb} +{re.escape(text)}", line) for line in lines)
    assert max(map(len, lines)) <= 100


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megagpt {megagpt.__version__}\n"


@pytest.mark.parametrize(
    ("verb", "hint"),
    [
        ("trian", "did you mean 'train'?"),
        ("pretrain", "did you mean 'train'?"),
        ("verify_parity", "did you mean 'parity'?"),
        ("eval", "did you mean 'evaluate'?"),
        ("--config", "megagpt --help tells all"),
    ],
)
def test_an_unknown_verb_names_the_nearest(verb, hint):
    with pytest.raises(UsageError, match=re.escape(f"unknown verb '{verb}'; {hint}")):
        main([verb])


def test_the_map_and_a_wrong_verb_start_at_once():
    code = (
        "import sys\n"
        "from megagpt.commands import command\n"
        "for word, code in (('--help', 0), ('--version', 0), ('trian', 2)):\n"
        "    sys.argv = ['megagpt', word]\n"
        "    try:\n        command()\n"
        "    except SystemExit as end:\n        assert end.code == code\n"
        "assert not {'torch', 'deepspeed', 'numpy', 'jsonargparse'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: unknown verb 'trian'; did you mean 'train'?\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_a_door_to_its_verb(script, capsys, monkeypatch):
    text = script.read_text()
    assert len(text.splitlines()) <= 6
    words = re.search(r"`megagpt ([a-z ]+)`", text).group(1).split()
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    shown = help_of(lambda: runpy.run_path(str(script), run_name="__main__"), capsys)
    assert shown == help_of(lambda: main([*words, "--help"]), capsys)


def test_the_demo_says_that_it_needs_the_repository(tmp_path, monkeypatch):
    demo = importlib.import_module("megagpt.commands.demo")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=f"needs launch/demo.yaml .* {tmp_path} .* clone"):
        main(["demo"])
