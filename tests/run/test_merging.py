"""The merge stage's search: what is tried, what is measured, what is taken."""

import json
from dataclasses import replace

import numpy as np
import pytest

from agentcpm_jax.config import MergeStage
from agentcpm_jax.merge.search import Point, SearchResult, pareto_set
from agentcpm_jax.run.merging import choose, merged, search
from agentcpm_jax.run.observe.summary import search_charts
from agentcpm_jax.types import UserError

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
