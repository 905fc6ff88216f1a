from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentcpm_jax.merge.plan import plan_merge, progress_line
from agentcpm_jax.merge.recipe import parse_recipe

INPUTS = Path(__file__).parents[1] / "golden" / "merging" / "inputs"
TIES = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [
        {"model": "ft1", "parameters": {"weight": 0.6, "density": [0.5, 0.1]}},
        {"model": "ft2", "parameters": {"weight": [{"filter": "mlp", "value": 2}, {"value": 1}]}},
    ],
    "parameters": {"density": 0.9},
}


def test_every_parameter_is_resolved_for_every_tensor():
    plan = plan_merge(parse_recipe(TIES), [INPUTS], Path())
    up = "model.layers.{}.mlp.up_proj.weight"
    assert plan.parameters[up.format(0)].startswith("weight=0.6,2 density=0.5,0.9 normalize=true")
    assert plan.parameters[up.format(1)].startswith("weight=0.6,2 density=0.1,0.9 normalize=true")
    embed = plan.parameters["model.embed_tokens.weight"]  # outside the layers: the first knot
    assert embed.startswith("weight=0.6,1 density=0.5,0.9")
    assert (plan.models, plan.base) == (("ft1", "ft2"), "base")
    assert plan.read == 3 * plan.written == 3 * 82304 * 4
    assert plan.peak_memory >= 512 * 64 * 4 and plan.seconds > 0
    text = plan.text()
    for name, line in plan.parameters.items():
        assert any(x.startswith(name) and x.endswith(line) for x in text.splitlines())
    assert "layer 1" in text and "outside the layers" in text


def test_the_conflict_map_sees_opposite_and_equal_task_vectors(tmp_path):
    for name in ("base", "ft1", "ft2"):
        shutil.copytree(INPUTS / name, tmp_path / name)
    base, tuned = (load_file(INPUTS / m / "model.safetensors") for m in ("base", "ft1"))
    opposite = {  # layer 0 moves the other way, layer 1 the same way
        name: 2 * base[name] - tuned[name] if ".layers.0." in name else tuned[name] for name in base
    }
    (tmp_path / "ft2" / "model.safetensors").unlink()
    save_file(opposite, tmp_path / "ft2" / "model.safetensors")
    plan = plan_merge(parse_recipe(TIES), [tmp_path], Path())
    first, second, outside = plan.conflicts
    assert (first.layer, second.layer, outside.layer) == (
        "layer 0",
        "layer 1",
        "outside the layers",
    )
    assert first.disagreement == 1.0 and first.cosine == pytest.approx(-1.0)
    assert second.disagreement == outside.disagreement == 0.0
    assert np.allclose([second.cosine, outside.cosine], 1.0)


def test_without_a_base_there_are_no_task_vectors():
    listed = [{"model": m, "parameters": {"weight": 1}} for m in ("ft1", "ft2")]
    plan = plan_merge(parse_recipe({"merge_method": "linear", "models": listed}), [INPUTS], Path())
    assert plan.conflicts == () and "task vectors" not in plan.text()


def test_progress_has_rate_and_time_left():
    line = progress_line(2_000_000_000, 8_000_000_000, 1_000_000_000, 10.0)
    assert line == "2.00 of 8.00 GB, 25%, 100 MB/s, 1 min 00 s left"
    assert progress_line(5, 10, 0, 0.0) == "0.00 of 0.00 GB, 50%"
    for seconds, left in ((4.4, "4 s"), (200.0, "3 min 20 s"), (3900.0, "1 h 05 min")):
        line = progress_line(0, 1_000_000_000, 1_000_000, seconds / 1000)
        assert line.endswith(f", {left} left")
