"""What a run will take, from shapes alone: a 4B recipe on a pod, each figure with its source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agentcpm_jax.run.commandline import explained, parse
from agentcpm_jax.types import UserError

RL = "--config=configs/rl_qwen3_4b.py"
MESH = ("--config.mesh.fsdp=4", "--config.mesh.context=8", "--config.model.remat=full")


def explanation(*flags: str) -> str:
    said: list[str] = []
    assert explained(parse([RL, *MESH, "--explain", *flags]), said.append)
    return said[0]


def test_every_figure_has_a_source_and_the_known_ones_are_right() -> None:
    text = explanation("--config.model.param_dtype=float32")
    assert "rl_qwen3_4b on v5p-64: 32 chips of 95.74 GiB, mesh fsdp 4, context 8" in text
    assert "parameters: 4,022,468,096 [exact]" in text
    assert "tokens a step: 524,288 (4 x 131,072) [exact]" in text
    assert "a checkpoint: 44.95 GiB [exact]" in text  # 12 bytes a parameter
    figures = [line for line in text.splitlines() if re.search(r"^  [a-zA-Z ]+: \S*\d", line)]
    assert len(figures) >= 9
    assert all(re.search(r"\[(exact|estimate)\]", line) for line in figures)


def test_cost_comes_from_the_price_file(tmp_path: Path) -> None:
    assert "give --prices=FILE" in explanation()
    prices = tmp_path / "prices.json"
    prices.write_text('{"v5p": [2, 4]}')
    text = explanation(f"--prices={prices}")
    hours, low, high = (
        int(x.replace(",", ""))
        for x in re.search(r"chip hours: ([\d,]+) .*cost ([\d,]+) to ([\d,]+)", text).groups()  # type: ignore[union-attr]
    )
    assert low == pytest.approx(2 * hours, abs=2) and high == pytest.approx(4 * hours, abs=4)
    prices.write_text("{}")
    with pytest.raises(UserError, match="no pair of prices for v5p"):
        explanation(f"--prices={prices}")


def test_impossible_targets_are_refused() -> None:
    with pytest.raises(UserError, match=r"unknown TPU slice 'v5p-63'; use one of .*v5p-64"):
        explanation("--slice=v5p-63")
    with pytest.raises(UserError, match=r"32 x context 8 .* nearest that fits"):
        explanation("--config.mesh.fsdp=32")
    assert not explained(parse([RL]), print)
