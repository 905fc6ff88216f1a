"""kill -9 of every process of a run at named points; `make test-faults` runs these.

The points, what is real in a trial and what is checked are described in experiments/kill_points.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentcpm_jax.run.commandline import CHECKOUT

LOST = ("steps_lost", "samples_lost", "samples_repeated")
pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", params=["--named", "--shared", "--pooled"])
def report(request: pytest.FixtureRequest, tmp_path_factory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("kills")
    script = CHECKOUT / "experiments" / "kill_points.py"
    command = [sys.executable, str(script), request.param, f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (out / "kill_points.json").exists(), done.stderr[-3000:]
    return json.loads((out / "kill_points.json").read_text())


def test_every_point_was_reached(report: dict[str, Any]) -> None:
    kills = [kill for life in report["lives"] for kill in life["kills"]]
    assert not [kill for kill in kills if kill["outcome"] != "killed"]
    assert {"--named": 12, "--shared": 7, "--pooled": 3}[report["command"].split()[-1]] == len(
        kills
    )


def test_nothing_is_lost_doubled_or_different(report: dict[str, Any]) -> None:
    assert [what for life in report["lives"] for what in life["broken"]] == []
    owed = [kill[name] for life in report["lives"] for kill in life["kills"] for name in LOST]
    assert owed and not any(owed)
