"""The README's quick tour, command by command, in an empty directory."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agentcpm_jax.run.commandline import CHECKOUT

README = (CHECKOUT / "README.md").read_text()
TOUR = README[README.index("## Quick tour") : README.index("## Where things are")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TOUR, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").split("\n")
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_two_commands_are_make_targets() -> None:
    start = README[README.index("## Start") : README.index("## Results")]
    named = re.findall(r"^make ([\w-]+)", start, re.MULTILINE)
    assert named == ["quickstart", "test"]
    makefile = (CHECKOUT / "Makefile").read_text()
    for target in {*named, *re.findall(r"`make ([\w-]+)[ `]", README)}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no target {target}"


@pytest.mark.runs
def test_every_command_of_the_tour_runs(tmp_path: Path) -> None:
    assert commands(), "the tour names no command"
    for command in commands():
        assert command[0] == "python" and command[1].startswith("launch/"), command
        script = [sys.executable, str(CHECKOUT / command[1])]
        # Recipes and configs are found from the checkout or given by path.
        given = [str(CHECKOUT / a) if a.startswith("configs/") else a for a in command[2:]]
        done = subprocess.run([*script, *given], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    report = (tmp_path / "runs" / "smoke" / "report.html").read_text()
    for stage in ("base", "sft", "merge", "rl", "eval"):
        assert stage in report
    assert (tmp_path / "runs" / "merged" / "model.safetensors").is_file()


def test_the_python_of_the_tour_runs() -> None:
    (snippet,) = blocks("python")
    scope: dict = {}
    exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["logits"].shape == (1, 8, scope["TINY"].vocab_size)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (CHECKOUT / link).exists()
