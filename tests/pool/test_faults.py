"""An RL stage on a pool of our own servers, as processes, one of which is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentcpm_jax.log.experience import ExperienceLog
from tests.pool.served_processes import our_servers

pytestmark = pytest.mark.faults
ROOT = Path(__file__).parents[2]
STEPS = 6


def rows(workdir: Path) -> list[dict]:
    path = workdir / "rl" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_a_stage_trains_on_two_servers_of_which_one_is_killed(tmp_path: Path) -> None:
    """No trajectory is lost: every issued group ends, every step has its rows."""
    workdir = tmp_path / "run"
    with our_servers(2) as pool:
        urls = tuple(url for _, url in pool)
        command = [sys.executable, "launch/train.py", "--config=configs/tiny.py:async"]
        command += [f"--workdir={workdir}", f"--config.stage.rl.pool.urls={urls!r}"]
        command += ["--config.stage.rl.pool.health_every=1.0"]
        with (tmp_path / "output").open("w") as output:
            train = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ)
            )
        while len(rows(workdir)) < 2:  # both serve by now
            assert train.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        pool[1][0].send_signal(signal.SIGKILL)
        assert train.wait(600) == 0, (tmp_path / "output").read_text()
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert found[1]["pool/ready"] == 2 and found[-1]["pool/ready"] == 1
    assert found[-1]["pool/uncertain_tokens"] == 0
    # What was sampled is what is trained on: at the first step no ratio differs from one.
    assert abs(found[0]["loss/ratio_max"] - 1) < 1e-4
    assert found[0]["loss/kl_behavior_k3"] < 1e-8
    assert (workdir / "rl" / "hf" / "model.safetensors").is_file()
    (weights,) = (workdir / "rl" / "pool_weights").iterdir()
    assert sorted(p.name for p in (weights / "weights").iterdir()) == ["v000005", "v000006"]
    with ExperienceLog.open(workdir / "experience.db") as log:
        shipped = [log.shipped("rl", step) for step in range(STEPS)]
    for segments in shipped:
        trained = {(s.issue_id, s.sample) for s in segments}
        assert len(trained) == 8  # two groups of four: none lost one of its samples
