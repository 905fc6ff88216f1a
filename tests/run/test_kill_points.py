"""kill -9 of trainer, worker and database at named points; `make test-faults` runs these.

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

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module", params=["--named", "--shared"])
def report(request: pytest.FixtureRequest, tmp_path_factory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("kills")
    script = CHECKOUT / "experiments" / "kill_points.py"
    command = [sys.executable, str(script), request.param, f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (out / "kill_points.json").exists(), done.stderr[-3000:]
    return json.loads((out / "kill_points.json").read_text())


def test_every_point_was_reached(report: dict[str, Any]) -> None:
    missed = [kill for kill in report["kills"] if kill["outcome"] != "killed"]
    assert not missed and len(report["kills"]) >= 7


def test_nothing_is_lost_doubled_or_different(report: dict[str, Any]) -> None:
    assert report["broken"] == []
