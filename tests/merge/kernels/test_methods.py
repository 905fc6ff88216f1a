"""Every method on one tensor: against mergekit's outputs, and by its properties."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from agentcpm_jax.merge.kernels import chunked
from agentcpm_jax.merge.kernels.methods import METHODS, merge_tensors, result_dtype
from agentcpm_jax.merge.recipe import load_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints
from agentcpm_jax.types import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "merging"
#: Cases that touch a documented difference: relative guards, float32 accumulation.
DIFFERENT = ("model_stock", "model_stock_filter_wise", "task_arithmetic_bf16")
CASES = [p for p in sorted(GOLDEN.glob("*/*.yml")) if p.stem not in DIFFERENT]
STOCHASTIC = json.loads((GOLDEN / "stochastic.json").read_text())
BF16 = ml_dtypes.bfloat16
W = {"weight": 1.0}


def normal(
    seed: int, shape: tuple[int, ...] = (6, 40), dtype: npt.DTypeLike = np.float32
) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def one(
    method: str,
    tensor: np.ndarray,
    base: np.ndarray,
    own: dict[str, float] | None = None,
    **keys: Any,
) -> np.ndarray:
    return merge_tensors(method, [tensor], base=base, model_params=[own or W], **keys)


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_the_default_equals_mergekit_where_no_difference_is_documented(case, tmp_path):
    merge_checkpoints(load_recipe(case), tmp_path / "out", [GOLDEN / "inputs"])
    assert_agrees(load_file(tmp_path / "out" / "model.safetensors"), case)


def test_arcee_fusion_equals_mergekit_but_for_its_cancellation(tmp_path):
    case = GOLDEN / "ill_conditioned" / "arcee_fusion.yml"
    recipe = load_recipe(case, "mergekit-0.1.5")
    merge_checkpoints(recipe, tmp_path / "out", [GOLDEN / "inputs"])
    assert_agrees(load_file(tmp_path / "out" / "model.safetensors"), case)


def assert_agrees(got: dict[str, np.ndarray], case: Path) -> None:
    want = load_file(case.with_suffix(".safetensors"))
    wrong = total = 0
    for name, reference in want.items():
        a, b = got[name][: len(reference)].astype(np.float64), reference.astype(np.float64)
        half = reference.dtype == BF16
        allowed = np.abs(b) * 2.0**-7 + 1e-9 if half else 2e-7 + 2e-6 * np.abs(b)
        wrong, total = wrong + np.sum(~(np.abs(a - b) <= allowed)), total + a.size
    assert total > 10_000
    assert wrong <= (0.005 * total if case.stem == "arcee_fusion" else 0)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("case", STOCHASTIC)
def test_random_methods_have_mergekits_statistics(case, name):
    recipe, want = STOCHASTIC[case]["config"], STOCHASTIC[case]["per_tensor"][name]
    files = {m: load_file(GOLDEN / f"inputs/{m}/model.safetensors") for m in ("base", "ft1", "ft2")}
    base = files["base"][name].astype(np.float64)
    shared = recipe.get("parameters", {})
    models = [files[m["model"]][name] for m in recipe["models"]]
    own = [m["parameters"] for m in recipe["models"]]
    deltas = np.stack(
        [
            merge_tensors(
                recipe["merge_method"],
                models,
                base=files["base"][name],
                global_params=shared,
                model_params=own,
                name=name,
                seed=seed,
                compat=True,
            )
            - base
            for seed in range(1000, 1064)
        ]
    )
    parts = [p["weight"] * (x - base) for p, x in zip(own, models, strict=True)]
    dense = shared.get("lambda", 1.0) * sum(parts)
    rtol = 0.03 if base.size >= 2048 else 0.15
    near = lambda a, key: np.testing.assert_allclose(a, want[key], rtol=rtol)  # noqa: E731
    near(np.mean(deltas != 0), "mean_changed_fraction")
    near(np.sum(np.abs(deltas)) / 64, "mean_delta_l1")
    slope = np.sum(deltas.mean(0) * dense) / np.sum(dense**2)
    near(slope, "regression_coef_on_dense_task_vector")


def test_rescaling_by_inverse_probability_is_unbiased_and_by_l1_is_exact_in_l1():
    tensor = np.tile(normal(1, (1, 512)), (800, 1))  # 800 draws for each entry
    base = np.zeros_like(tensor)
    for method, own in [("dare_linear", {}), ("della_linear", {"epsilon": 0.3})]:
        own = {**W, "density": 0.5, **own}
        out = one(method, tensor, base, own)
        mean, spread = np.mean(out, 0), np.std(out, 0) / np.sqrt(len(out))
        assert np.max(np.abs(mean - tensor[0]) / spread) < 5
        matched = one(method, tensor, base, own, global_params={"rescale": "l1"})
        np.testing.assert_allclose(np.abs(matched).sum(), np.abs(tensor).sum(), rtol=1e-5)


def test_della_keeps_with_a_probability_linear_in_the_rank():
    tensor = np.tile(normal(2, (1, 33)), (4000, 1))
    own, off = {**W, "density": 0.5, "epsilon": 0.4}, {"rescale": False}
    kept = one("della_linear", tensor, np.zeros_like(tensor), own, global_params=off) != 0
    want = 0.1 + 0.8 * np.argsort(np.argsort(np.abs(tensor[0]))) / 32
    assert np.max(np.abs(np.mean(kept, 0) - want) / np.sqrt(want * (1 - want) / 4000)) < 5


def test_masks_are_those_of_the_name_the_seed_and_the_model():
    tensor, zero = np.ones((40, 50), np.float32), np.zeros((40, 50), np.float32)
    own = {**W, "density": 0.5}

    def mask(name="q", seed=0, position=0):
        weights = [{"weight": float(i == position), "density": 0.5} for i in range(2)]
        return merge_tensors(
            "dare_linear",
            [tensor] * 2,
            base=zero,
            model_params=weights,
            name=name,
            seed=seed,
        )

    np.testing.assert_array_equal(mask(), mask())
    np.testing.assert_array_equal(mask(), one("dare_linear", tensor, zero, own, name="q"))
    for other in (mask(name="k"), mask(seed=1), mask(position=1)):
        agreement = np.mean((mask() != 0) == (other != 0))
        assert abs(agreement - 0.5) < 5 * 0.5 / np.sqrt(tensor.size)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_size_of_a_chunk_changes_no_bit(method, dtype, monkeypatch):
    args = arguments(method, dtype)
    whole = merge_tensors(method, **args)
    monkeypatch.setattr(chunked, "CHUNK", 80)
    assert merge_tensors(method, **args).tobytes() == whole.tobytes()
    assert whole.dtype == dtype and np.isfinite(whole.astype(np.float32)).all()


def arguments(method: str, dtype: npt.DTypeLike = np.float32, count: int = 3) -> dict[str, Any]:
    """Arguments that use the parts of a method; deltas small beside the weights."""
    spec = METHODS[method]
    count = min(spec.max_models or count, count)
    base = normal(0)
    tensors = [(base + 0.05 * normal(i + 1)).astype(dtype) for i in range(count)]
    shared = {"t": 0.02} if "t" in spec.global_params else {}
    own = {"weight": 0.6, "density": 0.55, "gamma": 0.1, "epsilon": 0.2, "scale": 0.7}
    own = {k: v for k, v in own.items() if k in spec.model_params}
    return {
        "tensors": tensors,
        "base": None if spec.needs_base is False else base.astype(dtype),
        "global_params": shared,
        "model_params": [own] * count,
        "name": "layer",
        "seed": 7,
    }


SYMMETRIC = [
    m for m in METHODS if METHODS[m].max_models is None and not m.startswith(("dare", "della"))
]


@pytest.mark.parametrize("method", SYMMETRIC)
def test_the_order_of_equal_inputs_does_not_matter(method):
    args = arguments(method)
    turned = {**args, "tensors": args["tensors"][::-1]}
    got, want = merge_tensors(method, **turned), merge_tensors(method, **args)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_density_1_is_the_method_without_a_sparsifier_bit_for_bit(dtype, compat):
    for method, plain in [
        ("dare_linear", "task_arithmetic"),
        ("della_linear", "task_arithmetic"),
        ("breadcrumbs", "task_arithmetic"),
        ("dare_ties", "ties"),
        ("della", "ties"),
        ("breadcrumbs_ties", "ties"),
    ]:
        args = arguments(method, dtype)
        args["model_params"] = [{"weight": 0.6 - 0.2 * i} for i in range(3)]
        args |= {"compat": compat, "global_params": {"normalize": True}}
        assert merge_tensors(method, **args).tobytes() == merge_tensors(plain, **args).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("method", [m for m in METHODS if "lambda" in METHODS[m].global_params])
def test_weight_0_and_lambda_0_are_the_base_bit_for_bit(method, dtype):
    args = arguments(method, dtype)
    args["base"][0] = -0.0
    own = [{**p, "weight": 0.0} for p in args["model_params"]]
    shared = {"normalize": False}
    got = merge_tensors(method, **{**args, "model_params": own, "global_params": shared})
    assert got.tobytes() == args["base"].tobytes()
    got = merge_tensors(method, **{**args, "global_params": {"lambda": 0.0}})
    assert got.tobytes() == args["base"].tobytes()


@given(st.integers(0, 2**16), st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
@settings(derandomize=True, deadline=None, max_examples=30)
def test_task_vectors_are_linear(seed, a, b):
    base, x, y = (normal(seed + i, (3, 5)).astype(np.float64) for i in range(3))
    both = merge_tensors(
        "task_arithmetic", [x, y], base=base, model_params=[{"weight": a}, {"weight": b}]
    )
    alone = [one("task_arithmetic", t, base, {"weight": w}) - base for t, w in ((x, a), (y, b))]
    np.testing.assert_allclose(both - base, alone[0] + alone[1], atol=1e-12)


def test_ties_by_hand():
    base = np.zeros((1, 4), np.float32)
    x, y = np.array([[4, -3, 2, 1]], np.float32), np.array([[-1, -2, 3, 4]], np.float32)
    own = [{"weight": 1.0, "density": 0.5}, {"weight": 0.5, "density": 0.5}]

    def ties(**shared):
        args = {"base": base, "model_params": own, "global_params": shared}
        return merge_tensors("ties", [x, y], **args).tolist()

    assert ties() == [[4, -3, 3, 4]]
    assert ties(normalize=False) == [[4, -3, 1.5, 2]]
    own = [{"weight": 0.2}, {"weight": 1.0}]
    assert ties(normalize=False)[0][0] == -1  # 0.2 * 4 < 1 * 1
    assert ties(normalize=False, elect="unweighted")[0][0] == pytest.approx(0.8)
    assert ties(normalize=False, elect="count")[0][0] == pytest.approx(0.8)  # 1 : 1 elects plus


def test_keep_overrides_the_density():
    x, zero = normal(3), np.zeros((6, 40), np.float32)
    for keep in (0, 1, 17, x.size):
        out = one("ties", x, zero, {**W, "density": 0.5, "keep": keep})
        assert np.count_nonzero(out) == keep
        largest = np.sort(np.abs(x), axis=None)[x.size - keep :]
        np.testing.assert_array_equal(np.sort(np.abs(out[out != 0])), largest)


def test_bfloat16_is_rounded_once_by_default_and_after_every_operation_under_compat():
    args = arguments("task_arithmetic", BF16)
    base, tensors = args["base"].astype(np.float64), args["tensors"]
    exact = base + sum(0.6 * (t.astype(np.float64) - base) for t in tensors)
    ours = merge_tensors("task_arithmetic", **args)
    np.testing.assert_array_equal(ours, exact.astype(BF16))
    theirs = merge_tensors("task_arithmetic", **args, compat=True)
    assert np.mean(theirs != ours) > 0.01


@pytest.mark.parametrize("method", ["model_stock", "sce"])
def test_small_task_vectors_count(method):
    base = normal(0)
    step = 1e-5 * np.abs(normal(1)) * base
    tensors = [base + step, base + 1.5 * step]
    out = merge_tensors(method, tensors, base=base)
    moved = np.abs(out - base).sum() / np.abs(step).sum()
    assert 0.9 < moved < 1.6
    if method == "model_stock":  # mergekit's absolute guard takes them for noise
        tiny = [(base * 0 + 1e-5 * t).astype(np.float32) for t in (normal(2), normal(2))]
        zero = np.zeros_like(base)
        theirs = merge_tensors(method, tiny, base=zero, compat=True, name="q")
        ours = merge_tensors(method, tiny, base=zero)
        np.testing.assert_allclose(ours, tiny[0], rtol=1e-5)
        assert np.abs(theirs).sum() < 0.5 * np.abs(ours).sum()


def test_slerp_keeps_the_length_and_its_ends():
    x, y = normal(1), normal(2)
    y *= np.linalg.norm(x) / np.linalg.norm(y)
    for t in (0.0, 0.3, 1.0):
        out = merge_tensors("slerp", [y], base=x, global_params={"t": t}, model_params=[{}])
        np.testing.assert_allclose(np.linalg.norm(out), np.linalg.norm(x), rtol=1e-5)
    np.testing.assert_allclose(out, y, rtol=1e-6)


def test_slerp_between_opposites_is_linear():
    """No great circle is the shortest between them, and the sine of their angle is 0."""
    x = normal(1)
    out = merge_tensors("slerp", [-x], base=x, global_params={"t": 0.3}, model_params=[{}])
    np.testing.assert_allclose(out, 0.4 * x, rtol=1e-5)


def test_the_dtype_of_the_result():
    assert result_dtype("ties", [np.float32, BF16], False) == np.float32
    assert result_dtype("arcee_fusion", [BF16, BF16], True) == np.float32
    args = arguments("arcee_fusion", BF16)
    assert merge_tensors("arcee_fusion", **args).dtype == BF16
    assert merge_tensors("arcee_fusion", **args, compat=True).dtype == np.float32
    wide = merge_tensors(
        "linear", [normal(0, dtype=BF16)] * 2, model_params=[W, W], dtype="float32"
    )
    assert wide.dtype == np.float32


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_reported_by_tensor_and_input(method, bad):
    args = arguments(method)
    args["tensors"][-1][2, 3] = bad
    last = len(args["tensors"])
    message = f"tensor layer of model {last} holds 1 NaN or infinite value"
    with pytest.raises(UserError, match=message):
        merge_tensors(method, **args)
    args = arguments(method)
    if args["base"] is not None:
        args["base"][0, 0] = bad
        labels = [*"abc"[: len(args["tensors"])], "general"]
        with pytest.raises(UserError, match="tensor layer of general holds 1 NaN"):
            merge_tensors(method, **args, labels=labels)


def test_an_overflow_is_reported():
    huge = np.full((2, 3), 3e38, np.float32)
    with pytest.raises(UserError, match="tensor v_proj overflows float32 while it is merged"):
        merge_tensors("karcher", [huge, -huge], name="v_proj")


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("tie", {}, "unknown merge_method 'tie'; use one of linear, "),
        ("ties", {"base": None}, "ties needs base_model"),
        ("linear", {"base": normal(0)}, "linear has no base_model"),
        ("slerp", {"tensors": [normal(0)] * 2, "model_params": []}, "slerp merges 1 models"),
        ("slerp", {"global_params": {}}, "slerp needs parameter 't' for tensor layer"),
        ("ties", {"model_params": [{}] * 3}, "ties needs parameter 'weight' for tensor layer"),
        ("ties", {"model_params": [{"weight": 1, "densitty": 1}] * 3}, "no parameter 'densitty'"),
        ("linear", {"model_params": [{"weight": w} for w in (1, 1, -2)]}, "layer sum to 0"),
        (
            "task_arithmetic",
            {
                "model_params": [{"weight": w} for w in (1, 1, -2)],
                "global_params": {"normalize": True},
            },
            r"weights \[1.0, 1.0, -2.0\] of tensor layer sum to 0, which cannot be normalised",
        ),
        ("multislerp", {"model_params": [{"weight": 0.0}] * 3}, "layer sum to 0"),
        (
            "della",
            {"model_params": [{"weight": 1, "density": 0.9}] * 3},
            "density 0.9 and epsilon 0.15 of layer keep with probability 0.75 to 1.05",
        ),
        ("breadcrumbs", {"model_params": [{"weight": 1, "density": 0.5, "gamma": 2}] * 3}, "gamma"),
        ("ties", {"global_params": {"elect": "most"}}, "elect 'most' is not one of weighted"),
        ("ties", {"global_params": {"rescale": "x"}}, "rescale 'x' is not true, false or one of"),
        ("ties", {"global_params": {"rescale": "inverse_prob"}}, "needs a random sparsifier"),
        ("ties", {"global_params": {"trim_scope": "layer"}}, "trim_scope 'layer' is not tensor"),
        ("ties", {"tensors": [normal(0), normal(0, (6, 39)), normal(0)]}, r"\(6, 40\), \(6, 39\)"),
        ("ties", {"tensors": [np.ones((6, 40), int)] * 3}, "tensor layer has dtype int64"),
        ("linear", {"model_params": [W]}, "1 sets of parameters for 3 models"),
    ],
)
def test_mistakes_say_what_is_wrong(method, change, message):
    args = {**arguments(method if method in METHODS else "ties"), **change}
    with pytest.raises(UserError, match=message):
        merge_tensors(method, **args)


def test_no_mean_direction_is_an_error():
    x = normal(1)
    half_turn = [x, -x, np.zeros_like(x)]
    with pytest.raises(UserError, match="mean direction of tensor q is zero"):
        merge_tensors("multislerp", half_turn, model_params=[W] * 3, name="q")


def test_merging_numpy_imports_no_jax():
    code = (
        "import sys, numpy as np;"
        "from agentcpm_jax.merge.kernels.methods import merge_tensors as m;"
        "m('dare_ties', [np.ones(4, 'f4')], base=np.zeros(4, 'f4'),"
        "  model_params=[{'weight': 1.0, 'density': 0.5}]); sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tensor_that_no_model_moved_stays():
    x = normal(1)
    same = merge_tensors("multislerp", [x] * 3, base=x, model_params=[W] * 3)
    np.testing.assert_array_equal(same, x)
    on_device = merge_tensors("multislerp", [jnp.asarray(x)] * 3, base=x, model_params=[W] * 3)
    np.testing.assert_array_equal(on_device, x)
