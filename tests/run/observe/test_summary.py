"""From results to claims: the numbers of the report, recomputed by hand."""

from __future__ import annotations

import pytest

from agentcpm_jax.run.observe.summary import differences, general_skill, result_lines, summarize


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
    summary = summarize(MODELS)
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


def test_general_skill_is_the_mean_over_skills() -> None:
    assert general_skill(MODELS["merge"]).value == pytest.approx(0.75)
    assert general_skill(MODELS["rl"]).value == 1.0


def test_sweep_points_are_not_compared() -> None:
    assert differences(list(MODELS)) == [("rl", "merge")]


def test_the_terminal_table_has_a_row_for_each_model() -> None:
    lines = result_lines(summarize(MODELS))
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
