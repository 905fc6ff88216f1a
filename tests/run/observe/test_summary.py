"""From results to claims: the numbers of the report, recomputed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agentcpm_jax.config import EvalStage, ExperimentConfig, MergeStage, Stage
from agentcpm_jax.run.evaluation import results_file
from agentcpm_jax.run.observe.summary import (
    attempts_table,
    differences,
    general_skill,
    model_results,
    result_lines,
    summarize,
)
from agentcpm_jax.run.stages import run_experiment
from agentcpm_jax.run.start.limits import check_limits
from agentcpm_jax.types import UserError


def result(right: list[int], skills: dict[str, list[int]]) -> dict:
    """Eight tasks of four samples, `right` of them right; greedy is right where any sample is."""
    kinds = ["hop1", "hop2"] * (len(right) // 2)
    rows = list(zip(right, kinds, strict=True))
    return {
        "sampled": [
            {"uid": f"t{i}", "kind": k, "n": 4, "c": c, "unknown": 0}
            for i, (c, k) in enumerate(rows)
        ],
        "greedy": [
            {"uid": f"t{i}", "kind": k, "n": 1, "c": int(c > 0), "unknown": 0}
            for i, (c, k) in enumerate(rows)
        ],
        "skills": skills,
        "decisions": {"syntax": [9, 10], "relation": [1, 2], "lookup": [3, 4], "copying": [5, 5]},
    }


MODELS = {
    "merge": result([0, 0, 1, 1, 2, 2, 0, 0], {"sort": [1, 1], "add": [1, 0]}),
    "rl": result([4, 4, 3, 3, 4, 2, 4, 4], {"sort": [1, 1], "add": [1, 1]}),
    "merge@0.5": {k: v for k, v in result([0] * 8, {"sort": [1, 1], "add": [0, 0]}).items()
                  if k != "sampled" and k != "decisions"},
}  # fmt: skip


def test_accuracies_and_paired_differences() -> None:
    summary = summarize(MODELS, (1, 2))
    assert summary["merge"]["sampled"]["value"] == pytest.approx(6 / 32)
    assert summary["rl"]["sampled"]["value"] == pytest.approx(28 / 32)
    assert summary["rl"]["greedy_by_kind"]["hop2"]["value"] == 1.0
    gain = summary["rl - merge (sampled)"]
    assert gain["value"] == pytest.approx(22 / 32)
    assert 0 < gain["low"] <= gain["value"] <= gain["high"]
    assert summary["rl - merge (greedy)"]["tasks"] == 8
    assert summary["rl"]["decisions"] == {
        "syntax": 0.9,
        "relation": 0.5,
        "lookup": 0.75,
        "copying": 1.0,
    }


def test_several_attempts_are_shown_for_the_k_of_the_stage() -> None:
    at_k = summarize(MODELS, (1, 3))["rl"]["sampled_at_k"]
    assert list(at_k) == ["mean@1", "pass@1", "pass^1", "mean@3", "pass@3", "pass^3"]
    assert at_k["pass@1"]["value"] == at_k["pass^1"]["value"] == pytest.approx(28 / 32)
    # Of 4 samples 4, 3 or 2 are right: all of 3 are with probability 1, 1/4 and 0.
    assert at_k["pass^3"]["value"] == pytest.approx((5 * 1 + 2 / 4 + 0) / 8)
    assert at_k["pass@3"]["value"] == 1.0
    rows = attempts_table({"rl": MODELS["rl"]}, (1, 3)).rows
    assert [(*row[:3], round(row[5].value, 4)) for row in rows] == [
        ("rl", 1, 8, 0.875),
        ("rl", 3, 8, 0.6875),
    ]


def test_a_k_above_the_samples_is_refused_before_the_run(tmp_path: Path) -> None:
    spec = EvalStage(samples=4, k=(1, 4))
    validation = MergeStage(validation=EvalStage(samples=1))  # its k and samples are not read
    stages = (Stage("m", validation), Stage("e", spec))
    check_limits(ExperimentConfig(stages=stages))
    for k in ((1, 8), (0,)):
        broken = Stage("e", replace(spec, k=k))
        with pytest.raises(UserError, match=r"stage\.e\.k is .*samples is 4"):
            run_experiment(ExperimentConfig(stages=(stages[0], broken)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_general_skill_is_the_mean_over_skills() -> None:
    assert general_skill(MODELS["merge"]).value == pytest.approx(0.75)
    assert general_skill(MODELS["rl"]).value == 1.0


def test_models_of_the_hub_keep_their_names(tmp_path: Path) -> None:
    """They come in the order of the stage, and a revision is no point of a sweep."""
    spec = EvalStage(models=("org/name@v1", "base"))
    for name in ("base", "org/name@v1", "merge@0.5"):
        (tmp_path / results_file(name)).write_text("{}")
    assert list(model_results(tmp_path, spec)) == ["org/name@v1", "base", "merge@0.5"]
    assert differences(["base", "org/name@v1", "merge@0.5"]) == [("org/name@v1", "base")]


def test_sweep_points_are_not_compared() -> None:
    assert differences(list(MODELS)) == [("rl", "merge")]


def test_the_terminal_table_has_a_row_for_each_model() -> None:
    lines = result_lines(summarize(MODELS, ()))
    assert lines[0].split() == [
        "model",
        "sampled",
        "greedy",
        "general",
        "syntax",
        "relation",
        "lookup",
        "copying",
    ]
    assert lines[2].split() == ["rl", "87.5", "100.0", "100.0", "90.0", "50.0", "75.0", "100.0"]
    assert lines[3].split() == ["merge@0.5", "-", "0.0", "50.0", "-", "-", "-", "-"]
    assert len(lines) == 4
