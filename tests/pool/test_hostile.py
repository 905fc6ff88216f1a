"""A whole run on a hostile pool; experiments/hostile_pool.py says what is real and what is checked.

The committed table is of a thousand odd answers; here it is one life.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentcpm_jax.run.commandline import CHECKOUT

pytestmark = pytest.mark.faults


def test_a_hostile_pool_is_trained_on_truthfully(tmp_path: Path) -> None:
    script = CHECKOUT / "experiments" / "hostile_pool.py"
    command = [sys.executable, str(script), "--n=1", "--steps=4", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (tmp_path / "hostile_pool.json").exists(), done.stderr[-3000:]
    (life,) = json.loads((tmp_path / "hostile_pool.json").read_text())["lives"]
    assert life["broken"] == [] and life["ends"][-1] == "done"
    assert life["odd"] > 30 and life["tokens"] > 250


def test_the_committed_table_is_of_a_thousand_answers_and_none_was_believed() -> None:
    results = CHECKOUT / "experiments" / "results" / "hostile_pool.json"
    report = json.loads(results.read_text())
    assert sum(life["odd"] for life in report["lives"]) >= 1000
    assert all(life["broken"] == [] and life["ends"][-1] == "done" for life in report["lives"])
    assert any(len(life["ends"]) > 1 for life in report["lives"]), "none was resumed"
