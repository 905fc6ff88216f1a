"""What the documents name is there, and the drawing is that of today's imports."""

from __future__ import annotations

import re
import sys

import pytest

from agentcpm_jax.run.commandline import CHECKOUT
from tests import moved

sys.path.insert(0, str(CHECKOUT / "experiments"))
import architecture

DOCUMENTS = ["CONTRIBUTING.md", "docs/architecture.md"]


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
