"""One job of two processes: what one process computes, stopped and resumed on any number of them.

Real launches of `launch/train.py` over gloo, eight CPU devices in all, however many processes.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.hf.files import Checkpoint
from agentcpm_jax.run.commandline import CHECKOUT
from agentcpm_jax.run.observe.metrics import read_metrics
from tests.pool.pool_training import check_training
from tests.pool.served_processes import our_servers

pytestmark = pytest.mark.mesh

DEVICES = 8
SFT = (
    "--config=configs/sft_qwen3_4b.py:runlocal",
    "--config.stage.sft.shape.rows=8",
    "--config.stage.sft.shape.micro_rows=0",
    "--config.stage.sft.shape.steps=16",
    "--config.stage.sft.shape.checkpoint_every=1000",
    "--config.stage.sft.optimizer.lr=1e-4",
    "--config.stage.sft.demonstrations.count=32",
    "--config.model.num_layers=1",
    "--config.model.width=32",
    "--config.model.ffw=64",
    "--config.mesh.data=2",
)
RL = (
    "--config=configs/tiny.py",
    "--config.stage.rl.shape.rows=8",
    "--config.stage.rl.shape.micro_rows=8",
    "--config.stage.rl.shape.steps=2",
    "--config.mesh.data=2",
)


class Job:
    """`launch/train.py` in so many processes; killed at the end whatever happens."""

    def __init__(self, workdir: Path, processes: int, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = [workdir.with_suffix(f".{i}.log") for i in range(processes)]
        self.processes = []
        for i, log in enumerate(self.logs):
            env = os.environ | {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes} "
                "--xla_cpu_multi_thread_eigen=false",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "PYTHONUNBUFFERED": "1",
            }
            if processes > 1:
                env |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(i),
                }
            script = str(CHECKOUT / "launch" / "train.py")
            command = [sys.executable, script, *flags, f"--workdir={workdir}"]
            with log.open("a") as output:
                process = subprocess.Popen(
                    command, env=env, stdout=output, stderr=subprocess.PIPE, text=True
                )
            self.processes.append(process)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def until_first_step(self) -> None:
        """Returns when process 0 shows the loss of its first step."""
        lines = []
        for line in self.processes[0].stderr:
            lines.append(line)
            if "loss " in line:
                return
        raise AssertionError("".join(lines)[-3000:])

    def ends(self, code: int) -> list[str]:
        """What every process wrote to stderr since; all must end with `code`."""
        written = [process.communicate(timeout=570)[1] for process in self.processes]
        for process, text in zip(self.processes, written, strict=True):
            assert process.returncode == code, text[-3000:]
        return written


def losses(workdir: Path, stage: str) -> dict[int, float]:
    rows = read_metrics(workdir / stage / "metrics.jsonl")
    return {row["step"]: row["train/loss"] for row in rows}


def weights(workdir: Path, stage: str) -> dict[str, np.ndarray]:
    with Checkpoint(workdir / stage / "hf") as found:
        return {name: np.asarray(found.read(name)) for name in found.tensors}


def test_a_run_moves_between_processes_and_meshes_and_computes_the_same(tmp_path: Path) -> None:
    """Stopped by a notice to either process, resumed elsewhere, hung, resumed: one loss curve."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    with Job(whole, 1, *SFT) as job:
        job.ends(0)
    reached = 0
    other_mesh = ("--config.mesh.data=1", "--config.mesh.tensor=2")
    for processes, notified, flags in ((2, 1, ()), (1, 0, other_mesh)):
        with Job(moved, processes, *SFT, *flags) as job:
            job.until_first_step()
            job.processes[notified].send_signal(signal.SIGTERM)
            said = job.ends(130)
        stopped = [text.rpartition("stopped after step ")[2].split()[0] for text in said]
        assert len(set(stopped)) == 1, "the processes stopped at different steps"
        assert max(losses(moved, "sft")) == int(stopped[0]) > reached
        assert [p.name for p in (moved / "sft/checkpoints").iterdir()].count(stopped[0]) == 1
        reached = int(stopped[0])

    with Job(moved, 2, *SFT, "--config.hang_seconds=8") as job:
        job.until_first_step()
        job.processes[1].send_signal(signal.SIGSTOP)
        job.processes[0].wait(timeout=570)
    assert job.processes[0].returncode == 130
    assert_names_the_stalled(job.logs[0].read_text())
    assert "most recent call" in (moved / "hang-process-0.txt").read_text()
    assert max(losses(moved, "sft")) > reached
    assert_same_curve(moved, whole)

    with Job(moved, 1, *SFT) as job:
        job.ends(0)
    assert len(losses(moved, "sft")) == 16
    assert_same_curve(moved, whole)
    exported, expected = weights(moved, "sft"), weights(whole, "sft")
    for name, value in expected.items():
        error = np.linalg.norm(exported[name] - value) / np.linalg.norm(value)
        assert error <= 1e-5, (name, error)


def assert_names_the_stalled(said: str) -> None:
    """Process 0 waits for process 1, and says where both are."""
    (line,) = [line for line in said.split("\n") if "hang: " in line]
    host = socket.gethostname()
    assert f"hang: process 0 ({host}): step " in line and "train step, for" in line
    waited_for = line.partition("it waits for ")[2]
    assert waited_for.startswith(f"process 1 ({host}): step ") and "the same command" in line


def assert_same_curve(ours: Path, theirs: Path) -> None:
    mine, expected = losses(ours, "sft"), losses(theirs, "sft")
    assert list(mine) == list(expected)[: len(mine)]
    np.testing.assert_allclose(list(mine.values()), list(expected.values())[: len(mine)], rtol=1e-6)


def test_rl_in_two_processes_equals_one(tmp_path: Path) -> None:
    """The first process samples and decides the batches; both step."""
    one, two = tmp_path / "one", tmp_path / "two"
    for workdir, processes in ((one, 1), (two, 2)):
        with Job(workdir, processes, *RL) as job:
            job.ends(0)
    ours, theirs = losses(two, "rl"), losses(one, "rl")
    assert list(ours) == list(theirs) == [1, 2]
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-6)
    assert read_metrics(two / "rl" / "metrics.jsonl")[0]["train/grad_norm"] > 0


def test_rl_in_two_processes_publishes_to_a_pool(tmp_path: Path) -> None:
    """Sharded parameters reach the server, which computes with what was trained."""
    workdir = tmp_path / "run"
    flags = ["--config=configs/quickstart.py:smoke", "--config.stages=('rl',)"]
    flags += ["--config.stage.rl.init_from=shipped:sft", "--config.stage.rl.pool.keep_versions=9"]
    flags += ["--config.stage.rl.shape.rows=8", "--config.stage.rl.shape.micro_rows=8"]
    with our_servers(1) as ((_, url),):
        flags += ["--config.mesh.data=2", f"--config.stage.rl.pool.urls={(url,)!r}"]
        with Job(workdir, 2, *flags) as job:
            job.ends(0)
    gaps = check_training(workdir, read_metrics(workdir / "rl" / "metrics.jsonl"))
    assert gaps.max() <= 1e-4
