from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from agentcpm_jax.merge.recipe import MergeRecipe, ModelEntry, load_recipe, parse_recipe
from agentcpm_jax.types import UserError

CASES = Path(__file__).parent / "golden" / "merging" / "cases"
RECIPE = yaml.safe_load(
    """
merge_method: task_arithmetic
base_model: base
models:
- model: sft
  parameters: {weight: 0.6}
- model: rl
parameters: {weight: 1e-1, lambda: 0.8}
dtype: float32
out_dtype: bfloat16
"""
)


def test_reads_mergekit_yaml():
    assert parse_recipe(RECIPE) == MergeRecipe(
        merge_method="task_arithmetic",
        base_model="base",
        models=(ModelEntry("sft", 0.6), ModelEntry("rl", 0.1)),
        lambda_=0.8,
        dtype="float32",
        out_dtype="bfloat16",
    )


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yml")), ids=lambda p: p.stem)
def test_written_yaml_reads_back_as_the_same_merge(path):
    if path.stem == "linear_filter_gradient":
        with pytest.raises(UserError, match="not supported yet: filters"):
            load_recipe(path)
        return
    recipe = load_recipe(path)
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()))
    assert again.normalized == recipe.normalized
    assert (again.inputs, again.lambda_, again.dtype) == (
        recipe.inputs,
        recipe.lambda_,
        recipe.dtype,
    )


def test_a_listed_base_has_no_task_vector():
    data = copy.deepcopy(RECIPE)
    data["models"].append({"model": "base"})
    del data["parameters"]["weight"]
    data["models"][1]["parameters"] = {"weight": 1}
    assert [m.model for m in parse_recipe(data).inputs] == ["sft", "rl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_metod": "linear"}, "unknown key 'merge_metod'"),
        ({"slices": []}, "not supported yet: slices"),
        ({"tokenizer_source": "union"}, "not supported yet: tokenizer_source"),
        ({"merge_method": "ties"}, "not supported yet: merge_method ties"),
        ({"merge_method": "average"}, "unknown merge_method 'average'"),
        ({"parameters": {"densitty": 0.5}}, "unknown key 'densitty' in parameters"),
        ({"parameters": {"normalize": "yes"}}, "normalize is 'yes'"),
        ({"parameters": {"weight": 1, "lambda": [0, 1]}}, "not supported yet: per-layer gradient"),
        ({"parameters": {"weight": True}}, "weight of rl is True"),
        ({"parameters": {"weight": float("nan")}}, "weight of rl is nan"),
        ({"parameters": {}}, "model rl has no weight"),
        ({"parameters": {"weight": -0.6, "normalize": True}}, "sum to 0"),
        ({"base_model": None}, "task_arithmetic needs base_model"),
        ({"merge_method": "linear", "parameters": {"weight": 1}}, "linear has no base_model"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"models": "sft"}, "`models` is not a list"),
        ({"models": []}, "lists no models"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "a is listed twice"),
        ({"models": [{"model": "base"}]}, "base is the only model"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(UserError, match=message):
        parse_recipe({**RECIPE, **change})


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml does not exist"):
        load_recipe(tmp_path / "nothing.yaml")
    path = tmp_path / "r.yaml"
    for text, message in [("a: [1", "is not YAML"), ("", "NoneType"), ("models: []", "merge_meth")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(path)
