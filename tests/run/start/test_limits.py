"""Limits that contradict each other are refused before anything runs, by every command."""

from __future__ import annotations

import pytest

from agentcpm_jax.config import SECTIONS, ExperimentConfig, Stage
from agentcpm_jax.run.commandline import parse
from agentcpm_jax.run.start.limits import check_limits
from agentcpm_jax.types import UserError

TINY, QUICKSTART = "--config=configs/tiny.py:async", "--config=configs/quickstart.py"


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_defaults_agree_with_each_other(kind: str) -> None:
    check_limits(ExperimentConfig(stages=(Stage("one", SECTIONS[kind]()),)))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([TINY, "stage.rl.shape.row_length=192"], "row_length=192 .*max_context=384"),
        ([TINY, "episode.max_context=400"], "row_length=384 .*max_context=400"),
        ([TINY, "stage.rl.engine.capacity=128"], "max_context=384 exceeds engine.capacity=128"),
        ([TINY, "stage.rl.shape.micro_rows=3"], r"shape\.rows=4 is not a multiple.*3"),
        ([TINY, "stage.rl.loss.updates=3"], r"rows=4 .* loss\.updates=3"),
        ([TINY, "stage.rl.shape.buckets=(999,)"], "buckets holds 999, .*row_length=384"),
        ([QUICKSTART, "stage.sft.shape.micro_rows=3"], r"stage\.sft\.shape\.rows=8"),
        ([QUICKSTART, "stage.eval.k=(9,)"], r"stage\.eval\.k is \(9,\)"),
        ([QUICKSTART, "stage.eval.engine.capacity=100"], "capacity=100"),
        ([QUICKSTART, "stage.merge.validation.engine.capacity=100"], "capacity=100"),
        ([QUICKSTART, "stages=()"], "stages is empty"),
        ([QUICKSTART, "mesh.data=0"], "mesh data 0 .*sizes are at least 1"),
        ([QUICKSTART, "mesh.slices=0"], "slices 0 is impossible"),
        ([QUICKSTART, "stage.merge.method=slerp"], r"merge\.method 'slerp'; use one of linear"),
    ],
)
@pytest.mark.parametrize("how", ["", "--doctor", "--explain"])
def test_a_contradiction_is_refused(flags: list[str], said: str, how: str) -> None:
    config, override = flags
    with pytest.raises(UserError, match=said):
        parse([config, f"--config.{override}", *([how] if how else [])])


@pytest.mark.parametrize(
    "flag",
    [
        *("seed=-1", "hang_seconds=-1.0", "episode.max_turns=0", "episode.temperature=-0.5"),
        *("stage.rl.shape.checkpoint_every=0", "stage.rl.shape.log_every=0"),
        *("stage.rl.shape.steps=-3", "stage.rl.shape.rows=0", "stage.rl.shape.row_length=-1"),
        *("stage.rl.optimizer.lr=-1.0", "stage.rl.optimizer.lr=nan", "stage.rl.optimizer.lr=inf"),
        *("stage.rl.optimizer.b2=1.5", "stage.rl.optimizer.clip_norm=-1.0"),
        *("stage.rl.engine.slots=0", "stage.rl.pool.request_timeout=-1.0"),
        *("stage.sft.epochs=0", "stage.sft.demonstrations.count=0", "stage.sft.data.max_length=0"),
        *("stage.merge.density=(1.5,)", "stage.merge.alpha=(nan,)", "stage.merge.keep=-0.1"),
        *("stage.eval.samples=0", "stage.eval.tasks=-1"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_its_key(flag: str) -> None:
    with pytest.raises(UserError) as error:
        parse([QUICKSTART, f"--config.{flag}"])
    path, value = flag.split("=")
    section, _, name = path.rpartition(".")
    assert section in str(error.value) and name in str(error.value)
    assert value.strip("(,)").removesuffix(".0") in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["mesh.tensor=8"], r"mesh.tensor 8 does not divide model.num_heads 4; .* fits is 4"),
        (["mesh.tensor=3"], r"mesh.tensor 3 does not divide model.num_heads 4"),
        (["mesh.context=3"], r"mesh.fsdp 1 x mesh.context 3 does not divide model.width 128"),
        (["mesh.data=3"], r"mesh.data 3 x mesh.fsdp 1 does not divide .*rl.shape.micro_rows 4"),
        (
            ["mesh.data=2", "stage.rl.shape.micro_rows=0", "stage.rl.shape.rows=3"],
            "mesh.data 2 x mesh.fsdp 1 does not divide config.stage.rl.shape.rows 3",
        ),
        (["mesh.data=-1"], "mesh data and fsdp are -1"),
    ],
)
def test_a_mesh_that_does_not_split_what_is_trained(flags: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse([TINY, *(f"--config.{flag}" for flag in flags)])
