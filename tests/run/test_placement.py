"""The same run on one device and on a mesh of four: equal losses, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.run.commandline import CHECKOUT
from agentcpm_jax.run.observe.metrics import read_metrics


def losses(workdir: Path, devices: int, *flags: str) -> np.ndarray:
    command = [
        sys.executable,
        str(CHECKOUT / "launch" / "train.py"),
        "--config=configs/sft_qwen3_4b.py:runlocal",
        "--config.stage.sft.init_from=shipped:base",
        f"--workdir={workdir}",
        *flags,
    ]
    flag = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": flag}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = read_metrics(workdir / "sft" / "metrics.jsonl")
    return np.array([[row["train/loss"], row["train/grad_norm"]] for row in rows])


@pytest.mark.mesh
def test_a_mesh_changes_nothing_but_the_placement(tmp_path: Path) -> None:
    one = losses(tmp_path / "one", 1)
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    four = losses(tmp_path / "four", 4, *mesh)
    assert one.shape == (4, 2)
    # Adam divides by the root of tiny second moments: rounding grows a little from step to step.
    np.testing.assert_allclose(four, one, rtol=2e-4)
    np.testing.assert_allclose(four[0], one[0], rtol=1e-5)
