"""The GPU's measuring script does on a CPU, in small, what it does there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from agentcpm_jax.model.config import QWEN3_4B
from agentcpm_jax.model.params import count
from agentcpm_jax.run.commandline import CHECKOUT

SCRIPT = CHECKOUT / "experiments" / "bench" / "gpu_h200.py"
spec = importlib.util.spec_from_file_location("gpu_h200", SCRIPT)
assert spec is not None and spec.loader is not None
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


@pytest.mark.runs
def test_every_part_is_measured_in_small_and_nothing_is_written(
    capsys, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(gpu, "OUT", tmp_path / "gpu")
    assert gpu.main(["--tiny", "--only", "sft_8k,rl_8k,decode"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {name: json.loads(rest) for name, _, rest in (line.partition(" ") for line in lines)}
    assert found["sft_8k"]["row_length"] == 128 and found["rl_8k"]["rows"] == 4
    # Of 256 equally likely tokens, before any training.
    assert found["sft_8k"]["loss_of_first_step"] == pytest.approx(5.545, abs=0.5)
    for name in ("sft_8k", "rl_8k"):
        part = found[name]
        flops = 4 * 128 * (6 * count(gpu.TINY) + 6 * 2 * 4 * 32 * 128)  # by hand
        rate = flops / part["seconds"]
        share = part["mfu_of_measured_matmul"]
        assert share == pytest.approx(rate / found["ceilings"]["matmul_flops"], rel=1e-6)
    one, many = found["decode_1x8192"], found["decode_64x4096"]
    assert many["tokens_per_second"] > one["tokens_per_second"]
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_the_real_size_is_refused(capsys) -> None:
    assert gpu.main([]) == 2
    assert "no GPU here" in capsys.readouterr().err
    assert gpu.MODEL.width == QWEN3_4B.width and gpu.MODEL.dtype == "bfloat16"
