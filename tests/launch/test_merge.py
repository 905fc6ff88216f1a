from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from agentcpm_jax.merge.recipe import load_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints

ROOT = Path(__file__).parents[2]
INPUTS = Path(__file__).parents[1] / "golden" / "merging" / "inputs"
RECIPE = """
merge_method: dare_linear
base_model: base
models:
- {model: ft1, parameters: {weight: 1, density: 0.5}}
"""
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
#: Distributions of the extra `merge` -> what they are imported as.
ALLOWED = {"ml-dtypes": "ml_dtypes", "numpy": "numpy", "pyyaml": "yaml", "xxhash": "xxhash"}
#: Nothing can be imported but those, the standard library and this package.
WITHOUT_THE_REST = f"""
import importlib.abc, runpy, sys
allowed = {{"agentcpm_jax", *{sorted(ALLOWED.values())}, *sys.stdlib_module_names}}
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in allowed:
            raise ImportError(f"{{name}} is not of the extra `merge`", name=name)
sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    assert allowed - sys.stdlib_module_names <= sys.modules.keys(), "the extra names too many"
"""


def launch(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_THE_REST, ROOT / "launch" / "merge.py", *args]
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_merges_without_the_training_stack(tmp_path):
    assert {re.split("[<>=]", line)[0] for line in EXTRAS["merge"]} == ALLOWED.keys()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    ran = launch(recipe, tmp_path / "out", "--seed=5", cwd=INPUTS)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"{tmp_path / 'out'}: 24 tensors, 82,304 parameters, 0.3 MB\n"
    merge_checkpoints(load_recipe(recipe), tmp_path / "here", [INPUTS], seed=5)
    got, want = (tmp_path / d / "model.safetensors" for d in ("out", "here"))
    assert got.read_bytes() == want.read_bytes()


def test_models_lie_beside_the_recipe_and_a_plan_writes_nothing(tmp_path):
    (tmp_path / "models").symlink_to(INPUTS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.replace("base_model: base", "base_model: models/base").replace("ft1", "models/ft1")
    )
    (tmp_path / "empty").mkdir()
    ran = launch(recipe, "out", "--plan", cwd=tmp_path / "empty")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "model.norm.weight" in ran.stdout and "weight=1 density=0.5" in ran.stdout
    assert {p.name for p in tmp_path.rglob("*")} == {"models", "recipe.yaml", "empty"}


def test_mistakes_are_one_line_and_compat_passes_them_by(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE + "densitty: 1\n")
    ran = launch(recipe, tmp_path / "out", cwd=INPUTS)
    assert ran.returncode == 2 and not ran.stdout and ran.stderr.count("\n") == 1
    assert "unknown key 'densitty'" in ran.stderr and str(recipe) in ran.stderr
    ran = launch(recipe, tmp_path / "out", "--compat=mergekit-0.1.5", cwd=INPUTS)
    assert ran.returncode == 0 and ran.stderr.startswith("note: unknown key 'densitty'")
