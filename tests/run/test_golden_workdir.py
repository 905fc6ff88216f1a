"""Workdirs that an earlier release left behind are resumed, replayed and explained by this one.

On the same kind of machine to the same bits; elsewhere recorded steps agree to float32's accuracy.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.run.commandline import CHECKOUT
from agentcpm_jax.run.inspect.replay import describe, replay
from agentcpm_jax.run.inspect.why import write_why
from agentcpm_jax.run.observe import machine
from agentcpm_jax.weights.publish import load_version
from agentcpm_jax.weights.store import versions
from tests.run.test_resume import COMPUTED, assert_exactly_once, curve, finish

pytestmark = pytest.mark.runs

GOLDEN = Path(__file__).parents[1] / "golden" / "workdir"
ASYNC = ("async", "--config.model.lora_rank=2")
LOCKSTEP = (
    "",
    "--config.stage.rl.init_from=random",
    *("--config.model.width=16", "--config.model.num_layers=2", "--config.model.num_heads=2"),
    *("--config.model.num_kv_heads=1", "--config.model.head_dim=8", "--config.model.ffw=32"),
    *("--config.stage.rl.optimizer.weight_decay=0.3", "--config.stage.rl.optimizer.lr=1e-2"),
)


def copied(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / name, tmp_path / "runs" / name))


def same_machine(workdir: Path) -> bool:
    return not machine.differences(machine.of_step(workdir / "rl", 1), machine.describe())


def assert_recomputed(workdir: Path, before: list[tuple]) -> None:
    """Steps that stand in the log were computed again as they were.

    The rewards beside them were those of whatever had ended meanwhile, and are now the batch's.
    """
    again = curve(workdir, COMPUTED)
    assert [row[0] for row in again] == [1, 2, 3, 4, 5, 6]
    if same_machine(workdir):
        assert again[: len(before)] == before
    np.testing.assert_allclose(again[: len(before)], before, rtol=1e-3, atol=1e-5)


def test_an_asynchronous_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    workdir = copied("async", tmp_path)
    before = curve(workdir, COMPUTED)
    assert before[2][1] != 0 != before[2][2], f"step 3 must have a {COMPUTED[0]} to prove anything"
    variant, *flags = ASYNC
    finish(workdir, variant, *flags)
    assert_recomputed(workdir, before)
    assert_exactly_once(workdir)


def test_a_lockstep_run_goes_on_with_its_published_weights(tmp_path: Path) -> None:
    workdir = copied("lockstep", tmp_path)
    before, published = curve(workdir, COMPUTED), load_version(workdir / "rl", 5)
    variant, *flags = LOCKSTEP
    finish(workdir, variant, *flags)
    assert_recomputed(workdir, before)
    assert_exactly_once(workdir)
    assert versions(workdir / "rl") == [5, 6]
    for leaf, same in zip(
        load_version(workdir / "rl", 5).values(), published.values(), strict=True
    ):
        if hasattr(leaf, "shape"):
            np.testing.assert_array_equal(leaf, same)


def test_a_recorded_step_is_replayed(tmp_path: Path) -> None:
    workdir = copied("async", tmp_path)
    found = replay(workdir, 3)
    expected = json.loads((workdir / "rl" / "metrics.jsonl").read_text().splitlines()[2])
    if same_machine(workdir):
        assert found.equal, describe(found)
    assert found.computed["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-3)


def test_an_issue_is_explained(tmp_path: Path) -> None:
    workdir = copied("lockstep", tmp_path)
    with sqlite3.connect(workdir / "experience.db") as log:
        (issue,) = log.execute("select issue_id from shipped where step = 2 limit 1").fetchone()
    page = write_why(workdir, issue, None, tmp_path / "why.html").read_text()
    assert "under the parameters after step 4" in page


def test_the_goldens_are_small_and_name_no_machine() -> None:
    files = [path for path in GOLDEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    assert not [path for path in files if str(CHECKOUT).encode() in path.read_bytes()]
