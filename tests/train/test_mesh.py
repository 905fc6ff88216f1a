"""Any mesh that divides gives one device's loss and gradient, in one process or in several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def start(meshes: dict[str, list[list[int]]], devices: int, *place: int) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    env = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    command = [sys.executable, str(HERE / "mesh_run.py"), json.dumps(meshes), *map(str, place)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def assert_equal(*processes: subprocess.Popen[str]) -> None:
    try:
        for process in processes:
            out, err = process.communicate(timeout=570)
            assert process.returncode == 0, err[-3000:]
            assert out.splitlines()[-1] == "equal"
    finally:
        for process in processes:
            process.kill()


@pytest.mark.mesh
def test_eight_devices_equal_one() -> None:
    """data x fsdp x context x tensor; key heads fewer than tensor devices, zig-zag time, mixes."""
    meshes = {
        "sft": [[8, 1, 1, 1], [1, 1, 2, 4], [1, 2, 4, 1]],
        "rl": [[1, 8, 1, 1], [2, 2, 1, 2], [1, 2, 2, 2]],
    }
    assert_equal(start(meshes, 8))


@pytest.mark.mesh
@pytest.mark.parametrize(("kind", "tensor"), [("sft", 2), ("rl", 4)])  # 4: more than key heads
def test_the_tensor_axis_alone_equals_one(kind: str, tensor: int) -> None:
    assert_equal(start({kind: [[1, 1, 1, tensor]]}, tensor))


@pytest.mark.mesh
def test_two_processes_of_four_devices_equal_one() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meshes = {"sft": [[2, 2, 2, 1]], "rl": [[1, 4, 1, 2]]}
    assert_equal(*(start(meshes, 4, i, 2, port) for i in range(2)))
