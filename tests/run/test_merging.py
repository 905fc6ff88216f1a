"""The merge stage's search: what is tried, what is measured, what is taken."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from agentcpm_jax.config import MergeStage, Stage
from agentcpm_jax.merge.search import Point, SearchResult, pareto_set
from agentcpm_jax.merge.soups import ema, warp
from agentcpm_jax.run.merging import averaged, choose, merged, run_merge, search
from agentcpm_jax.run.observe.summary import search_charts
from agentcpm_jax.types import UserError

#: The stage with the models in a directory, on several meshes; prints digests of what it saves.
ON_MESHES = """
import hashlib, json, sys
from dataclasses import replace
from pathlib import Path
import jax, numpy as np
from agentcpm_jax.config import ExperimentConfig, MergeStage, Stage
from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.model.config import TINY
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.model.params import init, param_specs
from agentcpm_jax.run import context, merging
from agentcpm_jax.run.start.signals import StopSignal
from agentcpm_jax.run.observe.metrics import silent
from agentcpm_jax.sharding import param_shardings

MODEL = replace(TINY, vocab_size=544)
RULES = {
    "linear": {},
    "dare_ties": {"method": "dare_ties"},
    "ema": {"souping": "ema", "soup": (sys.argv[1] + "/rl",)},
}
SOME = ("linear", "dare_ties")
root, saved, digests = Path(sys.argv[1]), [], []
for i, name in enumerate(("base", "sft", "rl")):
    save_hf(root / name, init(jax.random.key(i), MODEL), MODEL)
context.RunContext.save_model = lambda ctx, directory, params: saved.append(params)

def run(rule, where, mesh):
    merge = MergeStage(general=str(root / "base"), where=where, **RULES[rule])
    stage = Stage(f"{rule}_{where}", merge, str(root / "sft"))
    cfg = ExperimentConfig(model=MODEL, mesh=mesh, stages=(stage,))
    workdir = root / f"run{len(saved)}"
    ctx = context.open_context(cfg, workdir, silent, StopSignal())
    ctx.directory(stage).mkdir(parents=True)
    merging.run_merge(ctx, stage)
    if where == "mesh":
        shardings = param_shardings(param_specs(MODEL), ctx.mesh)
        assert jax.tree.map(lambda x: x.sharding, saved[-1]) == shardings, rule
    return [np.asarray(x) for x in jax.tree.leaves(saved[-1])]

for mesh, rules in [(MeshConfig(fsdp=2, tensor=4), RULES), (MeshConfig(data=4, fsdp=2), SOME)]:
    row = {}
    for rule in rules:
        on_mesh = run(rule, "mesh", mesh)
        row[rule] = hashlib.sha256(b"".join(x.tobytes() for x in on_mesh)).hexdigest()
        if rules is RULES:
            for got, want in zip(on_mesh, run(rule, "host", mesh), strict=True):
                assert want.dtype == got.dtype
                np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7, err_msg=rule)
    digests.append(row)
print(json.dumps(digests))
"""
GENERAL = {"w": np.zeros((4, 8), np.float32)}
SPECIAL = {"w": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)}
STAGE = MergeStage(alpha=(0.9, 0.3, 0.6), keep=0.5)


def agent(params) -> float:
    """Nearness to the specialist."""
    return float(np.exp(-np.linalg.norm(params["w"] - SPECIAL["w"])))


def general(params) -> float:
    """Nearness to the general model."""
    return float(1.0 / (1.0 + np.linalg.norm(params["w"])))


def points(*rows: tuple[float, float, float]) -> SearchResult:
    found = tuple(Point((("alpha", a),), agent, general) for a, agent, general in rows)
    return SearchResult("linear", found, pareto_set(found))


def test_the_first_point_is_the_general_model_and_the_others_lie_on_the_way():
    found = search(STAGE, SPECIAL, GENERAL, (agent, general))
    assert [dict(p.choice)["alpha"] for p in found.points] == [0.0, 0.3, 0.6, 0.9]
    assert found.points[0].general == 1.0
    agents, generals = zip(*((p.agent, p.general) for p in found.points), strict=True)
    assert list(agents) == sorted(agents) and list(generals) == sorted(generals, reverse=True)
    assert len(found.pareto) == 4  # each trades one skill for the other


def test_a_grid_of_alpha_and_density():
    stage = replace(STAGE, method="ties", density=(0.25, 1.0))
    found = search(stage, SPECIAL, GENERAL, (agent, general))
    tried = [dict(p.choice) for p in found.points[1:]]
    assert sorted((t["density"], t["alpha"]) for t in tried) == [
        (d, a) for d in (0.25, 1.0) for a in (0.3, 0.6, 0.9)
    ]
    whole = next(p for p in found.points[1:] if dict(p.choice) == {"alpha": 0.9, "density": 1.0})
    model = merged(stage, SPECIAL, GENERAL, dict(whole.choice))
    np.testing.assert_allclose(model["w"], 0.9 * SPECIAL["w"], rtol=1e-6)
    assert agent(model) == pytest.approx(whole.agent, rel=1e-5)
    trimmed = merged(stage, SPECIAL, GENERAL, {"alpha": 1.0, "density": 0.25})["w"]
    assert np.count_nonzero(trimmed) == 8


def test_the_largest_alpha_that_keeps_the_general_skill():
    found = points((0, 0.1, 1.0), (0.3, 0.5, 0.8), (0.6, 0.9, 0.6), (0.9, 0.7, 0.4))
    assert dict(choose(STAGE, found).choice) == {"alpha": 0.6}
    assert dict(choose(replace(STAGE, keep=0.7), found).choice) == {"alpha": 0.3}
    assert dict(choose(replace(STAGE, keep=0.3), found).choice) == {"alpha": 0.9}


def test_when_no_candidate_keeps_enough_the_nearest_to_the_general_model_is_taken():
    found = points((0, 0.1, 1.0), (0.3, 0.5, 0.2), (0.6, 0.9, 0.1))
    assert dict(choose(replace(STAGE, keep=0.9), found).choice) == {"alpha": 0.3}


def test_impossible_settings_are_named():
    with pytest.raises(UserError, match=r"merge\.density is empty"):
        MergeStage(density=())


def test_the_chart_shows_every_candidate_the_frontier_and_the_choice(tmp_path):
    found = points((0, 0.1, 1.0), (0.3, 0.5, 0.8), (0.6, 0.4, 0.6))
    (tmp_path / "search.json").write_text(json.dumps({"chosen": 1, **found.to_dict()}))
    [chart] = search_charts(tmp_path)
    assert chart.points == ((100, 10, "alpha 0"), (80, 50, "alpha 0.3"), (60, 40, "alpha 0.6"))
    assert chart.frontier == (0, 1) and chart.chosen == 1


def test_a_soup_is_averaged_by_its_rule_before_it_is_merged():
    other, stage = {"w": np.ones((4, 8), np.float32)}, replace(STAGE, soup=("rl",))
    moving = averaged(replace(stage, souping="ema"), SPECIAL, [other], GENERAL)
    np.testing.assert_array_equal(moving["w"], ema([other, SPECIAL])["w"])
    spherical = averaged(replace(stage, souping="warp"), SPECIAL, [other], GENERAL)
    np.testing.assert_array_equal(spherical["w"], warp(GENERAL, [SPECIAL, other])["w"])


@pytest.mark.mesh
def test_on_a_mesh_the_stage_merges_where_the_parameters_live(tmp_path):
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", ON_MESHES, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = json.loads(done.stdout)
    assert second == {rule: first[rule] for rule in ("linear", "dare_ties")}


def test_a_mesh_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    stage = Stage("merge", replace(STAGE, where="mesh"))
    nothing: Any = None
    with pytest.raises(UserError, match=r"merge\.where is 'mesh', which spans 2 processes"):
        run_merge(nothing, stage)
