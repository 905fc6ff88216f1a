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


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_about_ones_own_runs(number: int, tmp_path: Path) -> None:
    """With the files of the earlier blocks, in an empty folder."""
    made = [b for b in BLOCKS[:number] if ".jsonl" in b]
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_ / "python").chmod(0o755)
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(CHECKOUT / name)
    path = f"{bin_}:{os.environ['PATH']}"
    for block in [*(re.sub(r"(?m)^python .*$", "", b) for b in made), BLOCKS[number]]:
        command = ["bash", "-euo", "pipefail", "-c", block]
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
