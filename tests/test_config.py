"""Configurations: every shipped one is valid, and every mistake is one clear line."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest

from agentcpm_jax import config as config_module
from agentcpm_jax.config import (
    ExperimentConfig,
    Migration,
    config_from_json,
    default_config,
    from_config_dict,
    read_config,
    rename,
    stage_dict,
    to_json,
)
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.run.commandline import CHECKOUT, parse
from agentcpm_jax.run.context import check_config
from agentcpm_jax.types import UserError

QUICKSTART = "--config=configs/quickstart.py"
VARIANTS = [
    ("quickstart.py", ""),
    ("quickstart.py", "smoke"),
    ("sft_qwen3_4b.py", ""),
    ("sft_qwen3_4b.py", "runlocal"),
    ("rl_qwen3_4b.py", ""),
    ("rl_qwen3_4b.py", "runlocal"),
    ("sft_qwen3_0_6b.py", ""),
    ("sft_qwen3_0_6b.py", "t4"),
    ("sft_qwen3_0_6b.py", "runlocal"),
    ("lora_qwen3_4b.py", ""),
    ("lora_qwen3_4b.py", "t4"),
    ("lora_qwen3_4b.py", "runlocal"),
    ("tiny.py", ""),
    ("tiny.py", "async"),
]


@pytest.mark.parametrize(("file", "variant"), VARIANTS)
def test_shipped_configs_are_valid_and_survive_json(file: str, variant: str) -> None:
    command = parse([f"--config=configs/{file}" + (f":{variant}" if variant else "")])
    assert command.config.stages
    assert json.loads(json.dumps(to_json(command.config)))["name"] == command.config.name


def test_every_config_file_is_listed_here() -> None:
    assert {f for f, _ in VARIANTS} == {p.name for p in (CHECKOUT / "configs").glob("*.py")}


def test_the_original_recipes_numbers() -> None:
    sft = parse(["--config=configs/sft_qwen3_4b.py"]).config.stages[0].sft
    assert sft is not None and sft.epochs == 3
    assert (sft.optimizer.lr, sft.optimizer.warmup_fraction, sft.data.max_length) == (
        2e-5,
        0.03,
        21_000,
    )
    config = parse(["--config=configs/rl_qwen3_4b.py"]).config
    rl = config.stages[0].rl
    assert rl is not None
    assert rl.stream.batch_groups * rl.stream.group_size == 96
    assert (rl.optimizer.lr, rl.optimizer.b2, rl.optimizer.weight_decay) == (2e-6, 0.98, 0.05)
    assert (rl.loss.name, rl.loss.eps_high, rl.advantages.scale) == ("minirl", 0.3, 2.0)
    assert (config.episode.max_turns, config.episode.repetition_stop) == (100, 4)
    assert (config.model.rope_theta, config.model.max_positions) == (5e6, 262_144)


def test_overrides_may_stand_before_the_config() -> None:
    command = parse(["--config.stage.rl.shape.steps=7", QUICKSTART, "--workdir=elsewhere"])
    rl = command.config.stages[3].rl
    assert rl is not None and rl.shape.steps == 7
    assert command.workdir == Path("elsewhere")


def test_a_relative_config_is_found_from_any_directory(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse([QUICKSTART]).config.name == "quickstart"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--config=FILE"]),
        (["--config=configs/nothing.py"], ["configs/nothing.py", "configs/quickstart.py"]),
        ([QUICKSTART, "--config.seeed=1"], ["seeed"]),
        ([QUICKSTART, "--config.stage.rl.shape.stepz=1"], ["stepz"]),
        ([QUICKSTART, "--config.seed=one"], ["one"]),
        ([QUICKSTART, "--config.seed=1.5"], ["1.5"]),
        ([QUICKSTART, "--wrokdir=x"], ["wrokdir"]),
        ([QUICKSTART, "stray"], ["stray"]),
        ([QUICKSTART, "--config.stages=('base','nope')"], ["stage.nope"]),
        ([QUICKSTART, "--config.stages=('sft',)"], ["stage:base", "before"]),
        ([QUICKSTART, "--config.stage.rl.loss.name=ppo2"], ["ppo2", "minirl"]),
        ([QUICKSTART, "--config.stage.sft.kind=sfx"], ["sfx", "pretrain"]),
    ],
)
def test_mistakes_on_the_command_line_name_the_value(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(argv)
    message = str(error.value)
    assert "\n" not in message and "\\" not in message
    for word in words:
        assert word in message


def test_a_broken_config_file_names_the_line(tmp_path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return (\n")
    with pytest.raises(UserError, match=r"broken\.py:2"):
        parse([f"--config={path}"])


def test_unknown_keys_and_wrong_types_in_code() -> None:
    config = default_config()
    config.stage.sft = stage_dict("sft")
    config.stages = ("sft",)
    with config.unlocked():
        config.stage.sft.shape.row_lenght = 3
    with pytest.raises(UserError, match=r"stage\.sft\.shape\.row_lenght.*'row_length'"):
        from_config_dict(config)
    raw = {"name": 3}
    with pytest.raises(UserError, match=r"config\.name=3 is of type int; expected str"):
        from_config_dict(raw)


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(UserError, match="schema_version=99"):
        from_config_dict({"schema_version": 99})


def test_round_trip_of_a_whole_experiment() -> None:
    config = parse([QUICKSTART]).config
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(ExperimentConfig)}
    plain.pop("stages")
    assert dataclasses.replace(from_config_dict(plain), stages=config.stages) == config


GOLDEN = Path(__file__).parent / "golden"
STORED = {
    "async": GOLDEN / "workdir" / "async" / "config.json",
    "quickstart": GOLDEN / "config" / "version1.json",
}


@pytest.mark.parametrize("name", STORED)
def test_stored_configurations_of_earlier_releases_are_read_whole(name: str) -> None:
    raw = json.loads(STORED[name].read_text())
    assert only_keys_of(raw, json.loads(json.dumps(to_json(config_from_json(raw))))) == raw


def only_keys_of(old: Any, new: Any) -> Any:
    """`new` without the keys that were added since `old` was written."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: only_keys_of(old[key], new[key]) for key in old}
    if isinstance(old, list) and isinstance(new, list):
        return [only_keys_of(o, n) for o, n in zip(old, new, strict=True)]
    return new


def test_the_shipped_quickstart_resumes_what_version_1_began(tmp_path: Path) -> None:
    shutil.copy(STORED["quickstart"], tmp_path / "config.json")
    check_config(parse([QUICKSTART, "--config.hang_seconds=5"]).config, tmp_path / "config.json")
    changed = parse([QUICKSTART, "--config.seed=3", "--config.stage.rl.loss.name=grpo"]).config
    with pytest.raises(UserError, match=r"another configuration \(seed, stages\[3\]\.rl\.loss"):
        check_config(changed, tmp_path / "config.json")


@pytest.fixture
def version_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose streams say `attempts` for `retries`, stall later, and can be `fair`."""
    kept = [
        (f.name, typing.get_type_hints(StreamConfig)[f.name], f)
        for f in dataclasses.fields(StreamConfig)
        if f.name not in ("retries", "stall_timeout")
    ]
    new = [("attempts", int, 3), ("stall_timeout", float, 1800.0), ("fair", bool, False)]
    stream = dataclasses.make_dataclass("StreamConfig", [*kept, *new], frozen=True)
    monkeypatch.setattr(config_module, "StreamConfig", stream)
    monkeypatch.setattr(config_module, "SCHEMA_VERSION", 2)

    def respell(raw: dict[str, Any]) -> None:
        rename(raw, "stages.rl.stream.retries", "attempts")

    step = Migration({"stages.rl.stream.stall_timeout": 900.0}, respell)
    monkeypatch.setitem(config_module.MIGRATIONS, 1, step)


def of_version_2(raw: dict[str, Any], **stream: Any) -> ExperimentConfig:
    """What a user of version 2 writes who wants what `raw`, of version 1, says."""
    raw = copy.deepcopy(raw) | {"schema_version": 2}
    for stage in raw["stages"]:
        if stage["rl"] is not None:
            old = stage["rl"]["stream"]
            old["attempts"] = old.pop("retries")
            old |= stream
    return config_from_json(raw)


@pytest.mark.usefixtures("version_2")
@pytest.mark.parametrize("name", STORED)
def test_a_config_of_an_older_version_is_migrated_before_it_is_compared(
    name: str, tmp_path: Path
) -> None:
    raw = json.loads(STORED[name].read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    check_config(of_version_2(raw), file)
    at = next(i for i, stage in enumerate(raw["stages"]) if stage["rl"] is not None)
    for key, value in (("attempts", 9), ("stall_timeout", 1800.0), ("fair", True)):
        with pytest.raises(UserError, match=rf"\(stages\[{at}\]\.rl\.stream\.{key} differ\)"):
            check_config(of_version_2(raw, **{key: value}), file)
    assert json.loads(file.read_text()) == raw, "the file stays as it was written"


@pytest.mark.usefixtures("version_2")
def test_a_key_that_is_absent_had_the_default_of_its_own_version(tmp_path: Path) -> None:
    raw = json.loads(STORED["async"].read_text())
    wanted = of_version_2(raw, stall_timeout=900.0)
    del raw["stages"][0]["rl"]["stream"]["stall_timeout"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    check_config(wanted, tmp_path / "config.json")
    assert read_config(tmp_path) == wanted
    with pytest.raises(UserError, match="stall_timeout differ"):  # version 2's own default
        check_config(of_version_2(raw), tmp_path / "config.json")


@pytest.mark.usefixtures("version_2")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 3}, ["schema version 3", "reads 2", "upgrade agentcpm_jax"]),
        ({"schema_version": 0}, ["schema version 0", "the release that wrote it"]),
        ({"schema_version": None}, ["not a run's configuration", "restore it"]),
        ({"schema_version": "1"}, ["not a run's configuration", "restore it"]),
        ({"stages": 3}, ["not a run's configuration", "restore it"]),
        ({"rollouts": 3}, ["config.rollouts"]),
        ({"mesh": {"fsdpp": 1}}, ["config.mesh.fsdpp", "'fsdp'"]),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    change: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    raw = json.loads(STORED["async"].read_text())
    wanted = of_version_2(raw)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw | change))
    with pytest.raises(UserError) as error:
        check_config(wanted, file)
    for word in [str(file), *words]:
        assert word in str(error.value)


def test_an_unknown_key_of_a_stored_stage_is_refused_by_name() -> None:
    raw = json.loads(STORED["async"].read_text())
    raw["stages"][0]["started_from"] = "x"
    with pytest.raises(UserError, match=r"config\.stages\[0\]\.started_from"):
        config_from_json(raw)
    del raw["stages"][0]["started_from"]
    raw["stages"][0]["rl"]["stream"]["retry"] = 2
    with pytest.raises(UserError, match=r"config\.stage\.rl\.stream\.retry; did you mean"):
        config_from_json(raw)
