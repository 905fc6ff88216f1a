"""The table of mutations fits the code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("mutate", ROOT / "experiments" / "mutate.py")
assert spec is not None and spec.loader is not None
mutate = importlib.util.module_from_spec(spec)
sys.modules["mutate"] = mutate  # dataclasses look their module up
spec.loader.exec_module(mutate)


def test_every_mutated_text_stands_once_in_its_file_and_has_a_test() -> None:
    found = mutate.mutations()
    assert mutate.misfits(ROOT, found) == []
    assert len({m.name for m in found}) == len(found) == 72
    assert all(m.tests and m.old != m.new and "\n" not in m.old for m in found)
    assert sum(bool(m.equivalent) for m in found) <= 3


def test_what_no_longer_fits_is_named() -> None:
    first = mutate.mutations()[0]
    changed = mutate.Mutation(
        "Z1", first.file, "", "return s", "return -s", ("tests/test_tree.py::test_gone",), ""
    )
    times, test = mutate.misfits(ROOT, [changed])
    assert times.startswith(f"Z1: {first.file} holds 'return s'") and "not once" in times
    assert test == "Z1: there is no tests/test_tree.py::test_gone"
