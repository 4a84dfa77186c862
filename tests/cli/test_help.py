"""Help that is complete and quick, completion, versions, and a README that tells the same."""

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from mmc.cli import app

ROOT = Path(__file__).parents[2]
GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)


def options(command: str) -> list[str]:
    found = [
        max(parameter.opts, key=len)
        for parameter in GROUP.commands[command].params
        if parameter.param_type_name == "option"
    ]
    return sorted(set(found) - {"--help"})


def test_the_commands():
    assert COMMANDS == [
        "caption",
        "compact",
        "compare",
        "demo",
        "evaluate",
        "export",
        "extract",
        "info",
        "labels",
        "list",
        "neighbors",
        "predict",
        "prepare",
        "pretrain",
        "report",
        "run",
        "train-head",
        "tune",
        "verify",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_option_and_has_an_example(mmc: Callable, command: str):
    result = mmc(command, "--help")
    assert result.code == 0
    assert f"  mmc {command} " in result.out.split("Example")[1]
    for parameter in GROUP.commands[command].params:
        if parameter.param_type_name == "option" and "--help" not in parameter.opts:
            assert parameter.help, parameter.name
            assert max(parameter.opts, key=len) in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_tells_the_command_and_its_options(command: str):
    """The reference in the README is written by hand; this keeps it from drifting."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Commands")[1]

    def told_in(title: str) -> set[str]:
        section = text.split(f"### {title}")[1].split("\n### ")[0].split("\n## ")[0]
        found = set(re.findall(r"`(--[a-z][a-z-]*)", section))
        return found | (told_in("Source options") if "(#source-options)" in section else set())

    told = told_in(f"`mmc {command}")
    assert sorted(told) == options(command)


def test_flags_do_not_multiply_unseen():
    """A new knob goes into its component's config and is set with --set."""
    names = {option for command in COMMANDS for option in options(command)}
    assert len(names) <= 84, sorted(names)


def test_help_imports_no_torch():
    code = (
        "import sys; sys.argv = ['mmc', '--help']\n"
        "from mmc.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    sys.exit('torch' in sys.modules or 'zarr' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "extract" in done.stdout


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("mmc ext", "extract"), ("mmc train-head s r --head rou", "router"), ("mmc list h", "heads")],
)
def test_bash_completion(line: str, wanted: str):
    words = line.split(" ")
    environment = os.environ | {
        "_MMC_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    code = "from mmc.cli import app; app(prog_name='mmc')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert wanted in done.stdout.split(), done.stderr


def test_version_names_the_libraries_and_the_devices(mmc: Callable):
    result = mmc("--version")
    assert result.code == 0
    for name in ("mmc", "torch", "zarr", "faiss"):
        assert re.search(rf"^{name} +\d+\.\d+", result.out, re.M), result.out
    assert re.search(r"^devices +.*cpu", result.out, re.M)


@pytest.mark.parametrize("kind", ["backbones", "heads", "losses", "sources"])
def test_list_prints_the_table(mmc: Callable, kind: str):
    expected = {
        "backbones": ("open_clip", "hf"),
        "heads": ("linear", "mlp", "router", "zero_shot"),
        "losses": ("bce", "ce"),
        "sources": ("csv", "jsonl"),
    }[kind]
    names = [line.split()[0] for line in mmc("list", kind).out.splitlines() if line.strip()]
    assert set(expected) <= set(names)
    assert {row["name"] for row in mmc("list", kind, "--json").json()} >= set(expected)


def test_every_command_says_what_it_does():
    for command in COMMANDS:
        assert inspect.cleandoc(GROUP.commands[command].help or "").splitlines()[0].endswith(".")
