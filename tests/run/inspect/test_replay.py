"""A recorded step computed again has the same bits; what differs is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from agentcpm_jax.run.inspect.replay import describe, replay
from agentcpm_jax.run.observe import machine
from agentcpm_jax.run.observe.metrics import read_metrics
from agentcpm_jax.types import UserError
from tests.run.recorded_run import STEPS, checkpoints, finished

pytestmark = pytest.mark.runs


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every replay compiles its step; here they share one program, as resumed runs may."""
    changed = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished(), tmp_path / "run"))


def test_every_step_is_bit_equal() -> None:
    rows = read_metrics(finished() / "rl" / "metrics.jsonl")
    assert len({row["train/loss"] for row in rows}) == STEPS
    assert all(row["train/grad_norm"] > 0 for row in rows)
    # Step 4 from checkpoint 2 in two steps, step 2 from the initial parameters.
    for step, start in ((STEPS, 2), (2, 0)):
        found = replay(finished(), step)
        assert found.equal and found.start == start, describe(found)
        assert found.computed["train/loss"] == rows[step - 1]["train/loss"]
        assert {"train/grad_norm", "loss/ess", "train/entropy"} <= found.computed.keys()
        assert found.elsewhere == () and "bit-equal" in describe(found)[0]


def test_an_interrupted_run_replays_what_it_has(run: Path) -> None:
    """Killed after step 3: no last checkpoint, no last line, no model."""
    metrics = run / "rl" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]) + '{"step": 4,')
    shutil.rmtree(checkpoints(run).directory / "4")
    shutil.rmtree(run / "rl" / "hf")
    assert replay(run, 3).equal
    with pytest.raises(UserError, match=r"no step 4 .*it has 1 to 3"):
        replay(run, 4)


def test_the_last_bit_of_a_recorded_figure_is_noticed(run: Path) -> None:
    metrics = run / "rl" / "metrics.jsonl"
    rows = read_metrics(metrics)
    loss = rows[2]["train/loss"]
    rows[2]["train/loss"] = loss * (1 + 2**-40)
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = replay(run, 3)
    assert found.differing == {"train/loss": (loss * (1 + 2**-40), loss)}
    lines = describe(found)
    assert "NOT equal" in lines[0] and lines[1].strip().startswith("train/loss: recorded ")
    assert replay(run, 2).equal


def test_another_machine_is_named(run: Path) -> None:
    noted = run / "rl" / machine.FILE
    row = json.loads(noted.read_text())
    noted.write_text(json.dumps(row | {"jaxlib": "0.0.1"}) + "\n" + '{"after": 3, "jax')
    found = replay(run, 3)
    assert found.elsewhere == (f"jaxlib '0.0.1', here {row['jaxlib']!r}",)
    assert "another machine" in describe(found)[-1] and "equal even so" in describe(found)[-1]


def test_the_machine_of_a_step_is_the_last_one_that_computed_it(tmp_path: Path) -> None:
    rows = [{"after": 0, "jax": "a"}, {"after": 4, "jax": "b"}, {"after": 2, "jax": "c"}]
    (tmp_path / machine.FILE).write_text("".join(json.dumps(r) + "\n" for r in rows))
    of = {step: machine.of_step(tmp_path, step)["jax"] for step in (1, 2, 3, 5)}
    assert of == {1: "a", 2: "a", 3: "c", 5: "c"}
    assert machine.of_step(tmp_path / "none", 1) == {}
