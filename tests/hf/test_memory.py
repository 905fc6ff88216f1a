"""A model of 4B's shape, an eighth as wide, goes into shards and back without a second copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax import tree
from agentcpm_jax.hf.files import Checkpoint
from agentcpm_jax.hf.names import file_shapes
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.model.params import param_specs
from tests.hf import memory_program

SHAPES = file_shapes(tree.flatten(param_specs(memory_program.MODEL)))
SIZES = [2 * int(np.prod(shape)) for shape in SHAPES.values()]


@pytest.mark.parametrize("layers_at_once", [0, 4])
def test_anonymous_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, layers_at_once) -> None:
    save_hf(tmp_path / "a", memory_program.make(memory_program.MODEL), memory_program.MODEL)
    flags = "--xla_force_host_platform_device_count=4 --xla_cpu_multi_thread_eigen=false"
    command = [sys.executable, memory_program.__file__, str(tmp_path), str(layers_at_once)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ
        | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(memory_program.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    allowed = 2 * max(SIZES)
    # The devices of a CPU are host memory: the parameters themselves are not counted.
    assert sum(SIZES) // 2 < found["load"] <= sum(SIZES) + allowed, found
    assert found["save"] <= allowed, found
    with Checkpoint(tmp_path / "a") as one, Checkpoint(tmp_path / "b") as two:
        assert one.tensors == two.tensors
        for name in one.tensors:
            bits = [np.asarray(model.read(name)).view(np.uint16) for model in (one, two)]
            np.testing.assert_array_equal(*bits)
