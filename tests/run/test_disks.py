"""Damaged and refusing disks in whole runs; `experiments/disk_faults.py` says what is checked.

These trials need no file system of their own; the table in experiments/results has all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agentcpm_jax.run.commandline import CHECKOUT

pytestmark = pytest.mark.faults

TRIALS = ("flip_state", "log_header", "flip_weights", "torn_metrics", "file_limit", "quota_done")


def test_each_is_progress_or_one_line_and_nothing_untrue_is_trained(tmp_path: Path) -> None:
    script = str(CHECKOUT / "experiments" / "disk_faults.py")
    command = [sys.executable, script, f"--only={','.join(TRIALS)}", f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (tmp_path / "disk_faults.json").exists(), done.stderr[-3000:]
    found = json.loads((tmp_path / "disk_faults.json").read_text())["trials"]
    assert {trial["name"]: trial["broken"] for trial in found} == dict.fromkeys(TRIALS, "")
