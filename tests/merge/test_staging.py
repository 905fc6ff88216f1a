"""What interruptions, full disks and taken places do to an output."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agentcpm_jax.merge import streaming
from agentcpm_jax.merge.recipe import load_recipe, parse_recipe
from agentcpm_jax.merge.streaming import merge_checkpoints
from agentcpm_jax.types import UserError

ROOT = Path(__file__).parents[2]
INPUTS = Path(__file__).parents[1] / "golden" / "merging" / "inputs"
HALF = parse_recipe(
    {
        "merge_method": "linear",
        "models": [{"model": m, "parameters": {"weight": 1.0}} for m in ("base", "ft1")],
    }
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Copies of the models, which a test may change."""
    shutil.copytree(INPUTS, tmp_path / "models")
    return tmp_path / "models"


KILLED = """
import os, signal, sys
from pathlib import Path
from agentcpm_jax.merge import streaming
from agentcpm_jax.merge.recipe import load_recipe
streaming.SAVE_EVERY, streaming.MAX_FILE_BYTES = 0, 60_000
count = 0
def progress(done, total):
    global count
    count += 1
    if count == 14:
        os.kill(os.getpid(), signal.SIGKILL)
recipe, out, root = map(Path, sys.argv[1:])
streaming.merge_checkpoints(load_recipe(recipe), out, [root], progress, seed=3)
"""


def test_a_killed_merge_goes_on_and_ends_with_the_same_bytes(models, tmp_path, monkeypatch):
    text = (
        "{merge_method: dare_ties, base_model: base, models: [{model: ft1}, {model: ft2}], "
        "parameters: {weight: 0.5, density: 0.5}}"
    )
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    arguments = [tmp_path / "recipe.yaml", tmp_path / "out", models]
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)], cwd=ROOT, timeout=60, check=False
    )
    assert ran.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    shutil.copytree(partial, tmp_path / ".other.partial")
    calls = []
    monkeypatch.setattr(streaming, "MAX_FILE_BYTES", 60_000)
    result = merge_checkpoints(
        recipe, tmp_path / "out", [models], lambda *a: calls.append(a), seed=3
    )
    assert 10 <= result.resumed <= 14 and len(calls) == result.tensors - result.resumed
    assert "kept from an interrupted merge" in result.summary()
    # another seed is another merge: what is there is of no use to it
    assert merge_checkpoints(recipe, tmp_path / "other", [models], seed=4).resumed == 0
    merge_checkpoints(recipe, tmp_path / "whole", [models], seed=3)
    names = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = (tmp_path / "other" / names[-2]).read_bytes()
    assert other != (tmp_path / "whole" / names[-2]).read_bytes()


def test_a_changed_input_starts_the_merge_again(models, tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done * 2 > total:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SAVE_EVERY", 0)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(HALF, tmp_path / "out", [models], progress=interrupt)
    assert (tmp_path / ".out.partial").is_dir()
    path = models / "ft1" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = np.ones_like(tensors["model.norm.weight"])
    path.unlink()
    save_file(tensors, path)
    assert merge_checkpoints(HALF, tmp_path / "out", [models]).resumed == 0
    assert {p.name for p in tmp_path.iterdir()} == {"models", "out"}


def test_a_full_disk_leaves_nothing(models, tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"output .* cannot be written: .*File too large"):
            merge_checkpoints(HALF, tmp_path / "out", [models])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name for p in tmp_path.iterdir()} == {"models"}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UserError, match=r"needs 0\.33 MB, the disk has 0\.10 MB free"):
        merge_checkpoints(HALF, tmp_path / "out", [models])
    assert {p.name for p in tmp_path.iterdir()} == {"models"}


def test_an_existing_output_is_kept_and_one_being_written_is_not_touched(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        merge_checkpoints(HALF, tmp_path / "out", [models])
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"

    def twice(done: int, total: int) -> None:
        with pytest.raises(UserError, match="is being written by another process"):
            merge_checkpoints(HALF, tmp_path / "two", [models])

    merge_checkpoints(HALF, tmp_path / "two", [models], progress=twice)
    written, base = (
        load_file(d / "model.safetensors") for d in (tmp_path / "two", models / "base")
    )
    assert written.keys() == base.keys()


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_only_has_the_name_of_an_unfinished_merge_is_not_emptied(models, tmp_path, kind):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("kept")
    partial = tmp_path / ".out.partial"
    if kind == "folder":
        (tmp_path / "mine").rename(partial)
    elif kind == "link":
        partial.symlink_to(tmp_path / "mine")
    else:
        partial.write_text("kept")
    with pytest.raises(UserError, match=r"is no unfinished merge"):
        merge_checkpoints(HALF, tmp_path / "out", [models])
    assert kind == "file" or (partial / "notes.txt").read_text() == "kept"
