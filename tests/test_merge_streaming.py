from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentcpm_jax.merge.recipe import MergeRecipe, ModelEntry, load_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints
from agentcpm_jax.types import UserError

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "merging"
INPUTS = GOLDEN / "inputs"
CASES = sorted(GOLDEN.glob("cases/*.safetensors"))
HALF = MergeRecipe((ModelEntry("base", 1.0), ModelEntry("ft1", 1.0)))


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_equals_mergekit(case, tmp_path):
    recipe = load_recipe(case.with_suffix(".yml"))
    if case.stem == "task_arithmetic_bf16":  # mergekit calculates this one in bfloat16
        recipe = dataclasses.replace(recipe, compute_dtype="native")
    merge_checkpoints(recipe, tmp_path / "out", [INPUTS])
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
    recipe = load_recipe(GOLDEN / "cases" / "task_arithmetic_bf16.yml")
    merge_checkpoints(recipe, tmp_path / "out", [INPUTS])
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


def test_all_methods_are_covered():
    assert len(CASES) == 8


@pytest.fixture
def models(tmp_path) -> Path:
    """Writable copies of three models, the first with tokenizer files."""
    root = tmp_path / "models"
    shutil.copytree(INPUTS, root)
    vocab = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<x>", "id": 2}]}
    for name in ("base", "ft1"):
        (root / name / "tokenizer.json").write_text(json.dumps(vocab))
    (root / "base" / "chat_template.jinja").write_text("{{ messages }}")
    return root


def test_output_is_a_whole_checkpoint_with_a_card(models, tmp_path):
    recipe = MergeRecipe((ModelEntry("ft1", 0.5),), "task_arithmetic", "base", out_dtype="bfloat16")
    out = tmp_path / "new" / "out"
    seen = []
    result = merge_checkpoints(recipe, out, [models], progress=lambda *a: seen.append(a))
    assert seen == [(i + 1, result.tensors) for i in range(result.tensors)]
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").read_bytes() == (models / "base/tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    original = json.loads((models / "base" / "config.json").read_text())
    assert config == {**original, "dtype": "bfloat16"}
    card = (out / "README.md").read_text()
    for name in ("base", "ft1"):
        digest = hashlib.sha256((models / name / "model.safetensors").read_bytes()).hexdigest()
        assert f"| {name} | model.safetensors | `{digest}` |" in card
    assert recipe.to_yaml() in card
    assert {p.name for p in out.parent.iterdir()} == {"out"}


def test_sharding_changes_no_tensor_and_repeating_no_byte(models, tmp_path):
    merge_checkpoints(HALF, tmp_path / "one", [models])
    merge_checkpoints(HALF, tmp_path / "again", [models])
    merge_checkpoints(HALF, tmp_path / "many", [models], max_shard_bytes=60_000)
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
    alone = MergeRecipe((ModelEntry("many", 1.0),))
    merge_checkpoints(alone, tmp_path / "joined", [tmp_path])
    assert (tmp_path / "joined" / "model.safetensors").read_bytes() == one.read_bytes()


def test_transformers_loads_the_output(models, tmp_path):
    from transformers import Qwen3ForCausalLM

    merge_checkpoints(HALF, tmp_path / "out", [models])
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "out")
    want = load_file(tmp_path / "out" / "model.safetensors")
    state = {k: v.numpy() for k, v in model.state_dict().items() if k in want}
    assert state.keys() == want.keys()
    assert all(np.array_equal(state[k], want[k]) for k in want)


def edit(model: Path, change) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def edit_config(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: edit(m, lambda t: t.pop(NORM)), "model.norm.weight is missing from ft1"),
        (
            lambda m: edit(m, lambda t: t.update({NORM: t[NORM][:3]})),
            r"model.norm.weight has shape \(64,\) in base but \(3,\) in ft1",
        ),
        (
            lambda m: edit(m, lambda t: t.update({"lm_head.weight": np.ones((512, 64), "f4")})),
            "lm_head.weight is missing from base",
        ),
        (
            lambda m: edit(m, lambda t: t.update({NORM: np.ones(64, np.int64)})),
            "dtype I64 cannot be merged",
        ),
        (lambda m: (m / "model.safetensors").write_bytes(b"12"), "not a whole safetensors file"),
        (lambda m: (m / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda m: (m / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda m: (m / "config.json").unlink(), "config.json does not exist"),
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
    ],
)
def test_mismatches_are_named_and_leave_nothing(models, tmp_path, damage, message):
    damage(models / "ft1")
    with pytest.raises(UserError, match=message):
        merge_checkpoints(HALF, tmp_path / "out", [models])
    assert {p.name for p in tmp_path.iterdir()} == {"models"}


def test_truncated_weights_and_interruptions_leave_nothing(models, tmp_path):
    path = models / "ft1" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        merge_checkpoints(HALF, tmp_path / "out", [models])
    path.write_bytes(whole)

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(HALF, tmp_path / "out", [models], progress=interrupt)
    assert {p.name for p in tmp_path.iterdir()} == {"models"}


def test_an_existing_output_is_kept(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        merge_checkpoints(HALF, tmp_path / "out", [models])
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def launch(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "merge.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_launcher(models, tmp_path):
    recipe = models / "recipe.yaml"
    recipe.write_text(HALF.to_yaml())
    ran = launch(recipe, "out", cwd=tmp_path)  # models lie beside the recipe
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("out: 24 tensors, ")
    merge_checkpoints(HALF, tmp_path / "here", [models])
    got, want = (tmp_path / d / "model.safetensors" for d in ("out", "here"))
    assert got.read_bytes() == want.read_bytes()

    recipe.write_text(HALF.to_yaml() + "densitty: 1\n")
    ran = launch(recipe, "out2", cwd=tmp_path)
    assert ran.returncode == 2 and not ran.stdout
    assert ran.stderr.count("\n") == 1
    assert "unknown key 'densitty'" in ran.stderr and str(recipe) in ran.stderr


def test_merging_checkpoints_needs_no_jax():
    code = "import sys, agentcpm_jax.merge.streaming; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
