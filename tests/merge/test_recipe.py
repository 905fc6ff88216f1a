from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from agentcpm_jax.merge.recipe import MISSING, load_recipe, parse_recipe, value_for
from agentcpm_jax.types import UserError

CASES = Path(__file__).parents[1] / "golden" / "merging" / "cases"
RECIPE = yaml.safe_load(
    """
merge_method: ties
base_model: base
models:
- model: sft
  parameters: {weight: 0.6, density: 0.5}
- model: rl
parameters: {weight: 1e-1, lambda: 0.8}
dtype: float32
out_dtype: torch.bfloat16
"""
)
SLICED = yaml.safe_load(
    """
merge_method: slerp
base_model: a
slices:
- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
parameters: {t: 0.5}
"""
)


def test_reads_mergekit_yaml():
    recipe = parse_recipe(RECIPE)
    (part,) = recipe.slices
    assert recipe.models == ("sft", "rl", "base")
    assert part.sources[0].parameters == {"weight": 0.6, "density": 0.5}
    assert (recipe.dtype, recipe.out_dtype, recipe.compat) == ("float32", "bfloat16", False)
    assert value_for("weight", "x", 0.0, recipe.scopes) == 0.1
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yml")), ids=lambda p: p.stem)
def test_written_yaml_reads_back_as_the_same_merge(path):
    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_shipped_recipes_are_read():
    paths = sorted((Path(__file__).parents[2] / "configs").glob("merge_*.yaml"))
    assert len(paths) >= 2
    assert all(len(load_recipe(path).models) >= 2 for path in paths)


def test_older_forms_of_model_names():
    data = copy.deepcopy(RECIPE)
    data["models"][0]["model"] = {
        "model": {"path": "org/sft", "revision": "v1"},
        "lora": {"path": "org/lora"},
    }
    assert parse_recipe(data).models[0] == "org/sft@v1+org/lora"


def test_modules_are_one_more_scope():
    data = {
        "merge_method": "linear",
        "modules": {
            "default": {
                "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}],
                "parameters": {"weight": 3},
            }
        },
        "parameters": {"weight": 5},
    }
    recipe = parse_recipe(data)
    assert value_for("weight", "x", 0.0, recipe.scopes) == 3


def test_compat_ignores_what_mergekit_ignores_and_says_so():
    data = {**RECIPE, "out_dtyp": "bfloat16", "parameters": {"weight": 1, "densitty": 0.5}}
    recipe = parse_recipe(data, "mergekit-0.1.5")
    assert recipe.compat and recipe.to_yaml().count("compat: mergekit-0.1.5") == 1
    first, second = recipe.notes
    assert "'out_dtyp' in the recipe" in first and "'densitty' in parameters" in second
    assert parse_recipe({**RECIPE, "compat": "mergekit-0.1.5"}).compat


def test_int8_mask_has_no_effect_anywhere():
    assert parse_recipe({**SLICED, "parameters": {"t": 0.5, "int8_mask": True}}).notes == ()


@pytest.mark.parametrize(
    ("t", "value"), [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 0.6), (1.0, 0.2)]
)
def test_a_gradient_interpolates_between_equal_knots(t, value):
    assert value_for("t", "x", t, [{"t": [0.0, 1.0, 0.2]}]) == pytest.approx(value)


def test_gradients_of_switches_take_the_knot_below():
    scopes = [{"normalize": [True, False, True]}]
    assert [value_for("normalize", "x", t, scopes) for t in (0.0, 0.49, 0.5, 0.99, 1.0)] == [
        True,
        True,
        False,
        False,
        True,
    ]


def test_the_first_filter_that_fits_counts_and_no_fit_falls_through():
    narrow = {"w": [{"filter": "attn", "value": [1, 2]}, {"filter": "attn.q", "value": 9}]}
    wide = {"w": [{"filter": "mlp", "value": 3}, {"value": 4}]}
    assert value_for("w", "layers.0.attn.q", 0.5, [narrow, wide]) == 1.5
    assert value_for("w", "layers.0.mlp.up", 0.5, [narrow, wide]) == 3
    assert value_for("w", "norm", 0.5, [narrow, wide]) == 4
    assert value_for("w", "norm", 0.5, [narrow]) is MISSING
    assert value_for("w", "norm", 0.0, [{"w": [{"filter": "*", "value": "1e-3"}]}]) == 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_metod": "linear"}, "unknown key 'merge_metod' in the recipe"),
        ({"merge_method": "average"}, "unknown merge_method 'average'"),
        ({"merge_method": None}, "merge_method is missing"),
        ({"x_agentcpm": {}}, "x_agentcpm is no longer read; write `compat: mergekit-0.1.5`"),
        ({"compat": "mergekit-0.1.4"}, "compat is 'mergekit-0.1.4'"),
        ({"parameters": {"densitty": 0.5}}, "unknown key 'densitty' in parameters"),
        ({"parameters": {"keep": 5}}, "unknown key 'keep' in parameters"),
        ({"parameters": {"normalize": "yes"}}, "normalize in parameters is 'yes'"),
        ({"parameters": {"rescale": "l2"}}, "rescale in parameters is 'l2'; write l1,"),
        ({"parameters": {"elect": "loudest"}}, "elect in parameters is 'loudest'"),
        ({"parameters": {"weight": True}}, "weight in parameters is True"),
        ({"parameters": {"weight": float("nan")}}, "weight in parameters is nan"),
        ({"parameters": {"weight": []}}, "weight in parameters is an empty list"),
        ({"parameters": {"weight": [{"filter": "mlp"}]}}, "is not {filter: ..., value: ...}"),
        ({"parameters": {"weight": [0.5, {"value": 1}]}}, "mixes filters and values"),
        ({"parameters": [1]}, "parameters is list"),
        ({"base_model": None}, "ties needs base_model"),
        ({"merge_method": "linear", "parameters": {"lambda": 1}}, "unknown key 'lambda'"),
        ({"dtype": "int8"}, "dtype 'int8' is not one of"),
        ({"models": "sft"}, "`models` is not a list"),
        ({"models": []}, "lists no models"),
        ({"models": [{"model": "a"}, {"model": "a"}]}, "a is listed twice"),
        ({"models": [{"model": "base"}]}, "ties needs at least 1 model"),
        ({"models": [{"model": "a", "weight": 1}]}, "unknown key 'weight' in an entry of models"),
        ({"models": [{"parameters": {}}]}, "names no model"),
        (
            {"models": [{"model": "a", "parameters": {"lambda": 2}}]},
            "lambda in parameters of a is shared by all models",
        ),
        ({"slices": []}, "give one of models, slices and modules"),
        ({"models": None, "modules": {"vision": {}}}, "modules are vision"),
        ({"merge_method": "slerp", "parameters": {"t": 1}}, "slerp takes at most 1 model"),
        ({"tokenizer": {"sauce": "base"}}, "unknown key 'sauce' in tokenizer"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "tokenizer or tokenizer_source, not both"),
        ({"tokenizer": {"pad_to_multiple_of": 1.5}}, "pad_to_multiple_of is 1.5"),
    ],
)
def test_mistakes_are_named(change, message):
    data = {**copy.deepcopy(RECIPE), **change}
    if change.get("merge_method") in ("linear", "slerp"):
        data["models"] = [{"model": "sft"}, {"model": "rl"}]
    with pytest.raises(UserError) as error:
        parse_recipe(data)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "slice 0 has no sources"),
        ([{"model": "a"}], "a in slice 0 has no layer_range"),
        ([{"model": "a", "layer_range": [2, 1]}], "layer_range of a is [2, 1]"),
        (
            [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}],
            "layer ranges of slice 0 differ in length: a [0, 2], b [0, 3]",
        ),
    ],
)
def test_mistakes_in_slices_are_named(sources, message):
    with pytest.raises(UserError) as error:
        parse_recipe({**SLICED, "slices": [{"sources": sources}]})
    assert message in str(error.value)


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml does not exist"):
        load_recipe(tmp_path / "nothing.yaml")
    path = tmp_path / "r.yaml"
    for text, message in [("a: [1", "is not YAML"), ("", "NoneType"), ("models: []", "merge_meth")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(path)
