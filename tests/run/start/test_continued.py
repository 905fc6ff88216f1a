"""What may change when a run is resumed: every field of a configuration is on one of two lists."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentcpm_jax.config import SECTIONS, ExperimentConfig
from agentcpm_jax.run.commandline import parse
from agentcpm_jax.run.start.resume import (
    COMPUTES,
    FREE,
    check_config,
    claim,
    is_listed,
    kind_path,
)
from agentcpm_jax.types import UserError

TINY = "--config=configs/tiny.py:async"
QUICKSTART = "--config=configs/quickstart.py"


def fields(cls: type, path: str) -> Iterator[str]:
    """The paths of all values in a configuration class, as the lists spell them."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = [hints[field.name], *typing.get_args(hints[field.name])]
        section = next((hint for hint in inner if dataclasses.is_dataclass(hint)), None)
        if section is None or field.name == "stages":
            yield path + field.name
        else:
            yield from fields(section, f"{path}{field.name}.")


def every_field() -> list[str]:
    found = [path for path in fields(ExperimentConfig, "") if path != "stages"]
    found += ["stage.name", "stage.kind", "stage.init_from"]
    for kind, cls in SECTIONS.items():
        found += fields(cls, f"{kind}.")
    return found


def test_every_field_either_computes_or_is_free() -> None:
    found = every_field()
    assert len(found) > 200
    both = [f for f in found if is_listed(f, FREE) and is_listed(f, COMPUTES)]
    neither = [f for f in found if not is_listed(f, FREE) and not is_listed(f, COMPUTES)]
    assert (both, neither) == ([], [])
    unused = [p for p in (*FREE, *COMPUTES) if not any(is_listed(f, [p]) for f in found)]
    assert unused == [], "patterns of fields that are gone"


def test_paths_are_spelled_by_kind() -> None:
    assert kind_path("stages[3].rl.pool.urls[0]") == "rl.pool.urls"
    assert kind_path("stages[0].pretrain.phases[1].shape.steps") == "pretrain.phases.shape.steps"
    assert kind_path("stages[2].init_from") == "stage.init_from"
    assert kind_path("mesh.data") == "mesh.data"
    assert kind_path("stages") == "stages"


def resumed(workdir: Path, config: str, *flags: str) -> list[str]:
    """The lines about a resume with these flags of a run that was started without any."""
    claim(parse([config]).config, workdir)
    return check_config(parse([config, *flags]).config, workdir)


@pytest.mark.parametrize(
    "flag",
    [
        *("shape.steps=8", "shape.checkpoint_every=1", "shape.log_every=2", "shape.rows=8"),
        *("shape.row_length=512", "shape.micro_rows=2", "stream.stall_timeout=1800.0"),
        *("stream.breaker=128", "stream.max_concurrent_groups=8", "pool.api_key_env=X"),
        *("pool.urls=('http://a:1',)", "engine.slots=8", "engine.capacity=512", "judge.url=x"),
        *("judge.timeout=5.0", "workers.lease=9.0"),
    ],
)
def test_what_computes_nothing_may_change(flag: str, tmp_path: Path) -> None:
    said = resumed(tmp_path, TINY, f"--config.stage.rl.{flag}")
    assert len(said) == 1 and flag.partition("=")[0] in said[0] and ", was " in said[0]


@pytest.mark.parametrize(
    "flag",
    [
        *("optimizer.lr=1e-3", "loss.name=grpo", "stream.group_size=8", "stream.max_staleness=3"),
        *("shape.steps=5", "pool.pause=retract", "grader=numeric", "init_from=random"),
    ],
)
def test_what_computes_is_refused_by_its_path(flag: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"stages\[0\].*{flag.partition('=')[0]}"):
        resumed(tmp_path, TINY, f"--config.stage.rl.{flag}")


def test_more_steps_never_move_the_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sft\.shape\.steps is 900.*400.*cosine.*mid-run; keep"):
        resumed(tmp_path, QUICKSTART, "--config.stage.sft.shape.steps=900")


def test_several_updates_pin_the_layout(tmp_path: Path) -> None:
    flags = ["--config.stage.rl.loss.updates=2", "--config.stage.rl.shape.micro_rows=2"]
    claim(parse([TINY, *flags]).config, tmp_path)
    wider = parse([TINY, *flags, "--config.stage.rl.shape.row_length=512"]).config
    with pytest.raises(UserError, match=r"rl\.shape\.row_length differ"):
        check_config(wider, tmp_path)


def test_a_claim_keeps_what_the_run_goes_on_with(tmp_path: Path) -> None:
    old, new = parse([TINY]).config, parse([TINY, "--config.stage.rl.shape.steps=9"]).config
    assert check_config(new, tmp_path) == [], "no run yet: anything goes"
    claim(old, tmp_path)
    before = (tmp_path / "config.json").read_text()
    claim(old, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    claim(new, tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["stages"][0]["rl"]["shape"]["steps"] == 9
