"""Configurations: every shipped one is valid, and every mistake is one clear line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from agentcpm_jax.config import (
    ExperimentConfig,
    default_config,
    from_config_dict,
    stage_dict,
    to_json,
)
from agentcpm_jax.run.commandline import CHECKOUT, parse
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
