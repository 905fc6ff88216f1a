"""What the documents name is there, and the drawing is that of today's imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agentcpm_jax.run.commandline import CHECKOUT
from tests import moved

sys.path.insert(0, str(CHECKOUT / "experiments"))
import architecture

DOCUMENTS = ["CONTRIBUTING.md", "docs/architecture.md"]
OWN = (CHECKOUT / "docs" / "bring-your-own.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", OWN, re.DOTALL)


def test_the_drawing_is_todays() -> None:
    assert architecture.OUT.read_text() == architecture.draw(), "python experiments/architecture.py"


def test_implied_arrows_are_left_out() -> None:
    edges = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert architecture.reduced(edges) == {("a", "b"), ("b", "c")}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document: str) -> None:
    text = (CHECKOUT / document).read_text()
    named = re.findall(r"`((?:[\w.]+/)*\w+\.(?:py|md|txt|toml))`", text)
    there = [CHECKOUT, CHECKOUT / "agentcpm_jax"]
    assert named and [n for n in named if not any((root / n).exists() for root in there)] == []


def test_what_became_of_every_earlier_test_is_still_there() -> None:
    rows = [line.split("\t") for line in moved.TABLE.read_text().splitlines()[1:]]
    there = moved.present()
    told = ("merged into ", "dropped because ")
    assert rows and [r for r in rows if r[2] not in there and not r[2].startswith(told)] == []


def test_every_promise_names_tests_that_are_there() -> None:
    text = (CHECKOUT / "docs" / "promises.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| **")]
    assert rows
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, test in named:
            assert f"def {test}" in (CHECKOUT / file).read_text(), f"{file}::{test}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what a checkout has, and `python`."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    for name in ("launch", "configs", "agentcpm_jax"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    return tmp_path


def run_blocks(blocks: list[str], folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_about_ones_own_runs_without_training(number: int, folder: Path) -> None:
    """With the files of the earlier blocks."""
    files = [re.sub(r"(?m)^python .*$", "", b) for b in BLOCKS[:number] if "<<'END'" in b]
    run_blocks(
        [*files, re.sub(r"(?m)^python launch/train.py \$flags$", "", BLOCKS[number])], folder
    )


@pytest.mark.runs
def test_all_blocks_about_ones_own_run_one_after_the_other(folder: Path) -> None:
    run_blocks(BLOCKS, folder)
    assert (folder / "run" / "report.html").is_file()
