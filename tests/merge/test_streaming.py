from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file

from agentcpm_jax.hf.files import Checkpoint
from agentcpm_jax.merge import streaming
from agentcpm_jax.merge.inputs import fingerprint
from agentcpm_jax.merge.recipe import MergeRecipe, load_recipe, parse_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints
from agentcpm_jax.types import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "merging"
INPUTS = GOLDEN / "inputs"
CASES = [  # the methods' own tests have the rest of the models
    path
    for path in sorted(GOLDEN.glob("cases/*.safetensors"))
    if all((INPUTS / m).is_dir() for m in load_recipe(path.with_suffix(".yml")).models)
    and not path.stem.startswith("arcee_fusion")  # its rule is a share of elements
]
COMPAT = "mergekit-0.1.5"
NORM = "model.norm.weight"


def recipe_of(method: str = "linear", **keys) -> MergeRecipe:
    weighted = [{"model": m, "parameters": {"weight": 1.0}} for m in ("base", "ft1")]
    return parse_recipe({"merge_method": method, "models": weighted, **keys})


HALF = recipe_of()


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    with Checkpoint(directory) as found:
        return {name: np.array(found.read(name)) for name in found.tensors}


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_equals_mergekit(case, tmp_path):
    used = load_recipe(case.with_suffix(".yml"), COMPAT)
    merge_checkpoints(used, tmp_path / "out", [INPUTS])
    got, want = load_file(tmp_path / "out" / "model.safetensors"), load_file(case)
    stats = json.loads(case.with_suffix(".stats.json").read_text())
    assert {k: list(v.shape) for k, v in got.items()} == {k: v["shape"] for k, v in stats.items()}
    for name, reference in want.items():
        value = got[name][: len(reference)]  # the golden keeps the first rows of the embedding
        assert value.dtype == reference.dtype == np.dtype(stats[name]["dtype"])
        a, b = value.astype(np.float32), reference.astype(np.float32)
        if reference.dtype == ml_dtypes.bfloat16:  # one rounding step
            np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=1e-9)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-7)


def test_float32_arithmetic_is_nearer_the_truth_than_mergekits(tmp_path):
    merge_checkpoints(
        load_recipe(GOLDEN / "cases" / "task_arithmetic_bf16.yml"), tmp_path / "out", [INPUTS]
    )
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = load_file(GOLDEN / "cases" / "task_arithmetic_bf16.safetensors")
    base, ft1, ft2 = (
        {k: v.astype(ml_dtypes.bfloat16).astype(np.float64) for k, v in load_file(f).items()}
        for f in (INPUTS / m / "model.safetensors" for m in ("base", "ft1", "ft2"))
    )
    worse = 0
    for name, reference in theirs.items():
        b, x, y = (t[name][: len(reference)] for t in (base, ft1, ft2))
        exact = b + 0.7 * (x - b) + 0.5 * (y - b)
        half_a_step = np.abs(exact) * 2.0**-8 + 1e-8
        assert np.all(np.abs(ours[name][: len(reference)].astype(float) - exact) <= half_a_step)
        worse += np.sum(np.abs(reference.astype(float) - exact) > half_a_step)
    assert worse > 100


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Writable copies of the models, the first two with tokenizer files."""
    root = tmp_path / "models"
    shutil.copytree(INPUTS, root)
    for directory in root.iterdir():
        directory.chmod(0o755)
    vocab = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<x>", "id": 2}]}
    for name in ("base", "ft1"):
        (root / name / "tokenizer.json").write_text(json.dumps(vocab))
    (root / "base" / "chat_template.jinja").write_text("{{ messages }}")
    return root


def test_output_is_a_whole_checkpoint_with_a_card(models, tmp_path, monkeypatch):
    recipe = recipe_of("task_arithmetic", base_model="base", out_dtype="bfloat16")
    out = tmp_path / "new" / "out"
    seen = []
    monkeypatch.setattr(streaming, "MAX_FILE_BYTES", 60_000)
    result = merge_checkpoints(recipe, out, [models], progress=lambda *a: seen.append(a))
    assert len(seen) == result.tensors and seen[-1] == (result.nbytes, result.nbytes)
    assert seen == sorted(seen)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").read_bytes() == (models / "base/tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    original = json.loads((models / "base" / "config.json").read_text())
    assert config == {**original, "dtype": "bfloat16"}
    card = (out / "README.md").read_text()
    for name in ("base", "ft1"):
        digest = xxhash.xxh3_128((models / name / "model.safetensors").read_bytes()).hexdigest()
        assert f"| {name} | model.safetensors | `xxh3-128:{digest}` |" in card
    assert recipe.to_yaml() in card
    assert {p.name for p in out.parent.iterdir()} == {"out"}


def test_a_file_of_the_hubs_cache_is_known_by_its_name(models, tmp_path):
    blob = tmp_path / "blobs" / ("0a" * 32)
    blob.parent.mkdir()
    (models / "ft1" / "model.safetensors").rename(blob)
    (models / "ft1" / "model.safetensors").symlink_to(blob)
    with Checkpoint(models / "ft1") as found:
        assert fingerprint(found) == {"model.safetensors": f"sha256:{blob.name}"}


def test_sharding_changes_no_tensor_and_repeating_no_byte(models, tmp_path, monkeypatch):
    merge_checkpoints(HALF, tmp_path / "one", [models])
    merge_checkpoints(HALF, tmp_path / "again", [models])
    with monkeypatch.context() as patch:
        patch.setattr(streaming, "MAX_FILE_BYTES", 60_000)
        merge_checkpoints(HALF, tmp_path / "many", [models])
    one = tmp_path / "one" / "model.safetensors"
    assert one.read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    many = {k: v for f in files for k, v in load_file(tmp_path / "many" / f).items()}
    whole = load_file(one)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in whole.values())
    assert many.keys() == whole.keys()
    assert all(many[k].tobytes() == whole[k].tobytes() for k in whole)
    # a sharded directory is read like a whole one
    alone = parse_recipe({"merge_method": "passthrough", "models": [{"model": "many"}]})
    merge_checkpoints(alone, tmp_path / "joined", [tmp_path])
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == one.read_bytes()


def test_transformers_loads_the_output(models, tmp_path):
    from transformers import AutoModelForCausalLM

    stacked = {  # one layer twice: a frankenmerge of three layers
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "base", "layer_range": [0, 2]}]},
            {"sources": [{"model": "ft1", "layer_range": [1, 2]}]},
        ],
    }
    (models / "base" / "tokenizer.json").unlink()
    merge_checkpoints(parse_recipe(stacked), tmp_path / "out", [models])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = load_file(tmp_path / "out" / "model.safetensors")
    state = {k: v.numpy() for k, v in model.state_dict().items() if k in want}
    assert state.keys() == want.keys() and model.config.num_hidden_layers == 3
    assert all(np.array_equal(state[k], want[k]) for k in want)
    base, tuned = (load_file(models / m / "model.safetensors") for m in ("base", "ft1"))
    for name in base:
        if ".layers.1." in name:
            assert np.array_equal(want[name], base[name])
            assert np.array_equal(want[name.replace(".1.", ".2.")], tuned[name])
    assert np.array_equal(want[NORM], tuned[NORM])  # what comes after the layers: the last slice
    embedding = "model.embed_tokens.weight"
    assert np.array_equal(want[embedding], base[embedding])


def test_filters_of_models_see_the_inputs_names_and_shared_ones_the_outputs(models, tmp_path):
    moved = {
        "merge_method": "passthrough",
        "slices": [
            {
                "sources": [
                    {
                        "model": "base",
                        "layer_range": [1, 2],
                        "parameters": {"scale": [{"filter": "layers.1.", "value": 2.0}]},
                    }
                ]
            }
        ],
    }
    merge_checkpoints(parse_recipe(moved), tmp_path / "out", [models])
    got, base = tensors_of(tmp_path / "out"), tensors_of(models / "base")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert np.array_equal(got[name.format(0)], 2 * base[name.format(1)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (1, ["full_attention"])


def test_mixed_precision_is_promoted_and_out_dtype_rounds_once(models, tmp_path):
    tensors = load_file(models / "ft1" / "model.safetensors")
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    save_file(half, models / "ft1" / "model.safetensors")
    merge_checkpoints(HALF, tmp_path / "wide", [models])
    merge_checkpoints(recipe_of(out_dtype="bfloat16"), tmp_path / "narrow", [models])
    wide, narrow = tensors_of(tmp_path / "wide"), tensors_of(tmp_path / "narrow")
    base = tensors_of(models / "base")
    for name, value in wide.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(
            value, 0.5 * (base[name] + half[name].astype(np.float32)), rtol=1e-6, atol=1e-8
        )
        assert np.array_equal(narrow[name], value.astype(ml_dtypes.bfloat16))
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"


def edit(model: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors")


def edit_config(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: edit(m, lambda t: t.pop(NORM)), "model.norm.weight is missing from ft1"),
        (
            lambda m: edit(m, lambda t: t.pop("model.layers.1.self_attn.v_proj.weight")),
            "model.layers.1.self_attn.v_proj.weight is missing from ft1",
        ),
        (
            lambda m: edit(m, lambda t: t.update({NORM: t[NORM][:3]})),
            "model.norm.weight has shape (64,) in base but (3,) in ft1",
        ),
        (
            lambda m: (
                edit(m, lambda t: t.update({"lm_head.weight": np.ones((512, 64), "f4")})),
                edit_config(m, tie_word_embeddings=False),
                edit_config(m.parent / "base", tie_word_embeddings=False),
            ),
            "lm_head.weight is missing from base; merge models of one architecture, all with tied",
        ),
        (
            lambda m: edit(m, lambda t: t.update({"lm_head.weight": np.ones((512, 64), "f4")})),
            "lm_head.weight differs from model.embed_tokens.weight, but config.json has tie_word",
        ),
        (lambda m: edit_config(m, tie_word_embeddings=False), "tie_word_embeddings is True in"),
        (
            lambda m: (
                edit(m, lambda t: t.update({k: v[:500] for k, v in t.items() if "embed" in k})),
                edit_config(m, vocab_size=500),
            ),
            "model.embed_tokens.weight has shape (512, 64) in base but (500, 64) in ft1",
        ),
        (
            lambda m: edit_config(m, vocab_size=500),
            "vocab_size is 500 in config.json of ft1, but model.embed_tokens.weight has 512 rows",
        ),
        (
            lambda m: edit(m, lambda t: t.update({NORM: np.ones(64, np.int64)})),
            "model.norm.weight has dtype I64, which cannot be merged",
        ),
        (
            lambda m: edit(m, lambda t: t[NORM].__setitem__(5, np.nan)),
            "model.norm.weight of ft1 holds 1 NaN or infinite values",
        ),
        (lambda m: rewrite(m / "model.safetensors", b"12"), "not a whole safetensors file"),
        (
            lambda m: rewrite(
                m / "model.safetensors", (m / "model.safetensors").read_bytes()[:-100]
            ),
            "ft1/model.safetensors is not a whole safetensors file (its header promises",
        ),
        (lambda m: (m / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"),
            "model.safetensors is missing (pytorch_model.bin is not read",
        ),
        (lambda m: rewrite(m / "config.json", b"{"), "config.json cannot be read"),
        (lambda m: (m / "config.json").unlink(), "config.json is missing"),
        (lambda m: shutil.rmtree(m), "model ft1 is not a directory"),
        (lambda m: edit_config(m, num_attention_heads=2), "num_attention_heads is 4 in base but 2"),
        (
            lambda m: edit_config(m, rope_parameters=None, rope_theta=5e6),
            "rope_theta is 10000.0 in base but 5000000.0",
        ),
        (
            lambda m: (m / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}'),
            "token 'a' has id 0 in base but 1 in ft1",
        ),
        (
            lambda m: (m / "model.safetensors.index.json").write_text(
                '{"weight_map": {"x": "model.safetensors"}}'
            ),
            "tensor x of",
        ),
    ],
)
def test_mismatches_are_named_and_leave_nothing(models, tmp_path, damage, message):
    damage(models / "ft1")
    with pytest.raises(UserError) as error:
        merge_checkpoints(HALF, tmp_path / "out", [models])
    assert message in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"models"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"models": [{"model": "base"}, {"model": "ft1"}], "parameters": {"weight": [0.0, 0.5]}},
            "of tensor model.layers.0.input_layernorm.weight sum to 0, which cannot be normalised",
        ),
        (
            {"models": [{"model": "base"}], "base_model": "ft1"},
            "model base has no weight for tensor model.layers.0.input_layernorm.weight",
        ),
        (
            {
                "models": [{"model": "ft1", "parameters": {"weight": 1}}],
                "base_model": "base",
            },
            "model base has no weight for tensor model.layers.0.input_layernorm.weight",
        ),
        (
            {
                "models": None,
                "slices": [{"sources": [{"model": "base", "layer_range": [1, 3]}]}],
                "parameters": {"weight": 1},
            },
            "layer_range [1, 3] of base goes beyond its 2 layers",
        ),
    ],
)
def test_impossible_parameters_are_named_before_anything_is_written(
    models, tmp_path, keys, message
):
    with pytest.raises(UserError) as error:
        merge_checkpoints(recipe_of(**keys), tmp_path / "out", [models])
    assert message in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"models"}


def test_a_filter_that_fits_nothing_is_noted(models, tmp_path):
    recipe = recipe_of(parameters={"normalize": [{"filter": "self_atn", "value": False}]})
    result = merge_checkpoints(recipe, tmp_path / "out", [models])
    assert result.notes == ("filter 'self_atn' of normalize fits no tensor",)


def test_trim_scope_model_trims_the_task_vector_as_one(tmp_path):
    recipe = parse_recipe(
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "ft1", "parameters": {"weight": 1, "density": 0.3}}],
            "parameters": {"trim_scope": "model"},
        }
    )
    merge_checkpoints(recipe, tmp_path / "out", [INPUTS])
    got, base, tuned = (tensors_of(d) for d in (tmp_path / "out", INPUTS / "base", INPUTS / "ft1"))
    moved = np.concatenate([(got[n] != base[n]).reshape(-1) for n in base])
    size = np.abs(np.concatenate([(tuned[n] - base[n]).reshape(-1) for n in base]))
    assert moved.sum() == int(0.3 * moved.size)
    assert size[moved].min() >= size[~moved].max()
