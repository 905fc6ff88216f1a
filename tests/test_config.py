"""Configurations: every shipped one is valid, and every mistake is one clear line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest

from agentcpm_jax import config as config_module
from agentcpm_jax import migrations
from agentcpm_jax.config import (
    ExperimentConfig,
    config_from_json,
    default_config,
    from_config_dict,
    read_config,
    stage_dict,
    to_json,
)
from agentcpm_jax.engine.server import ServerConfig
from agentcpm_jax.migrations import Migration, rename
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.run.commandline import CHECKOUT, parse
from agentcpm_jax.run.start.resume import check_config
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


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("file", "variant"), VARIANTS)
def test_shipped_configs_are_valid_and_survive_json(file: str, variant: str) -> None:
    command = parse([f"--config=configs/{file}" + (f":{variant}" if variant else "")])
    assert command.config.stages
    assert json.loads(json.dumps(to_json(command.config)))["name"] == command.config.name


def test_every_config_file_is_listed_here() -> None:
    assert {f for f, _ in VARIANTS} == {p.name for p in (CHECKOUT / "configs").glob("*.py")}


@pytest.mark.usefixtures("published")
def test_the_original_recipes_numbers() -> None:
    sft = parse(["--config=configs/sft_qwen3_4b.py"]).config.stages[0].sft
    assert sft is not None and sft.epochs == 3
    assert (sft.optimizer.lr, sft.optimizer.warmup, sft.data.max_length) == (
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


def test_another_schema_is_refused() -> None:
    with pytest.raises(UserError, match="schema_version=99"):
        from_config_dict({"schema_version": 99})


def test_there_are_at_most_two_hundred_fields() -> None:
    """A key that nobody would tune is a constant; one that says what another says is that one."""

    def classes(hint: Any) -> set[type]:
        found = set().union(*map(classes, typing.get_args(hint)))
        if dataclasses.is_dataclass(hint):
            found |= {hint}.union(*map(classes, typing.get_type_hints(hint).values()))
        return found

    counts = {c: len(dataclasses.fields(c)) for c in {*classes(ExperimentConfig), ServerConfig}}
    assert sum(counts.values()) <= 200, counts


def test_a_variant_may_leave_open_again_what_its_recipe_gives() -> None:
    local = "--config=configs/rl_qwen3_4b.py:runlocal"
    assert (config := parse([local]).config).tokenizer is None
    assert config.stages[0].rl is not None and config.stages[0].rl.tasks_path is None
    flags = ["--config.stage.rl.tasks_path=mine.jsonl", "--config.tokenizer=mine"]
    config = parse([local, *flags]).config
    assert config.tokenizer == "mine" and config.stages[0].rl is not None
    assert config.stages[0].rl.tasks_path == "mine.jsonl"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("tokenizer=somewhere", "somewhere"),
        ("tokenizer=", None),
        ("stage.rl.tasks_path=tasks.jsonl", "tasks.jsonl"),
        ("stage.rl.shape.micro_rows=4", 4),
        ("stage.rl.shape.micro_rows=0", None),
        ("stage.sft.epochs=2", 2),
        ("stage.rl.loss.eps_high=1", 1.0),
        ("stage.rl.loss.corrections=()", ()),
        ("stage.rl.workers.trainer_groups=0", 0),
        ("stage.rl.advantages.minimal=0.5", 0.5),
    ],
)
def test_what_is_left_open_can_be_given_on_the_command_line(flag: str, value: object) -> None:
    found: Any = parse([QUICKSTART, f"--config.{flag}"]).config
    path = flag.partition("=")[0].split(".")
    if path[0] == "stage":
        found = next(s for s in found.stages if s.name == path[1]).section
        path = path[2:]
    for name in path:
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_a_variant_may_leave_open_what_its_recipe_gives() -> None:
    variant = "configs/rl_qwen3_4b.py:runlocal"
    found = parse([f"--config={variant}", "--config.stage.rl.tasks_path=tasks.jsonl"]).config
    assert found.stages[0].section.tasks_path == "tasks.jsonl"
    assert parse([f"--config={variant}"]).config.stages[0].section.tasks_path is None


def test_round_trip_of_a_whole_experiment() -> None:
    config = parse([QUICKSTART]).config
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(ExperimentConfig)}
    plain.pop("stages")
    assert dataclasses.replace(from_config_dict(plain), stages=config.stages) == config


GOLDEN = Path(__file__).parent / "golden"
STORED = {
    "async": GOLDEN / "workdir" / "async" / "config.json",
    "quickstart": GOLDEN / "config" / "version1.json",
    "quickstart 2": GOLDEN / "config" / "version2.json",
}


def test_a_stored_configuration_is_read_whole() -> None:
    raw = json.loads(STORED["quickstart 2"].read_text())
    assert only_keys_of(raw, json.loads(json.dumps(to_json(config_from_json(raw))))) == raw


def only_keys_of(old: Any, new: Any) -> Any:
    """`new` without the keys that were added since `old` was written."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {key: only_keys_of(old[key], new[key]) for key in old}
    if isinstance(old, list) and isinstance(new, list):
        return [only_keys_of(o, n) for o, n in zip(old, new, strict=True)]
    return new


def test_version_1_means_today_what_it_meant() -> None:
    config = config_from_json(json.loads(STORED["quickstart"].read_text()))
    assert config == config_from_json(json.loads(STORED["quickstart 2"].read_text()))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (
            "stages.rl.denoise.agreement",
            0.7,
            r"stages\[3\]\.rl\.denoise\.agreement is 0\.7.* at 0\.5",
        ),
        ("stages.rl.pool.backoff", 1.0, r"stages\[3\]\.rl\.pool\.backoff is 1\.0; .* at 0\.2"),
        ("stages.merge.pick", "agent", r"stages\[2\]\.merge\.pick is 'agent'; .* at 'largest'"),
        ("stages.rl.loss.normalize", "batch", r"rl\.loss\.normalize is 'batch'; .* at 'none'"),
        ("stages.eval.judge.retries", 9, r"stages\[4\]\.eval\.judge\.retries is 9; .* at 2"),
        ("train_tasks.world.stale", 0.5, r"train_tasks\.world\.stale is 0\.5; .* at 0\.0"),
        ("stages.base.phases.mix", {}, "mix"),
    ],
)
def test_a_value_that_is_gone_is_refused_with_its_path(path: str, value: Any, said: str) -> None:
    raw = json.loads(STORED["quickstart"].read_text())
    for section, key, _ in migrations.places(raw, path.replace("base.", "pretrain.")):
        section[key] = value
    with pytest.raises(UserError, match=rf"{said}.*since schema version 2"):
        config_from_json(raw)


@pytest.mark.parametrize(
    ("old", "path", "value"),
    [
        ({"warmup_fraction": 0.03, "warmup_steps": 0}, "optimizer.warmup", 0.03),
        ({"warmup_fraction": 0.03, "warmup_steps": 7}, "optimizer.warmup", 7.0),
        ({"votes": 3, "models": ["a", "b"]}, "judge.models", ("a", "b", "a")),
        ({"corrections": [{"name": "none", "low": -1.0, "high": -1.0}]}, "loss.corrections", ()),
        ({"trainer_groups": 0}, "workers.trainer_groups", 0),
        ({"estimator": "grpo"}, "advantages.estimator", "grpo"),
        ({"stall_timeout": 60.0, "sample_deadline": 240.0}, "stream.stall_timeout", 60.0),
        ({"group_size": 1, "min_valid": 1}, "stream.group_size", 1),
    ],
)
def test_what_version_1_said_in_other_words(old: dict, path: str, value: object) -> None:
    raw = json.loads(STORED["quickstart"].read_text())
    section, name = path.split(".")
    raw["stages"][3]["rl"][section] |= old
    rl = config_from_json(raw).stages[3].rl
    assert getattr(getattr(rl, section), name) == value


def test_the_shipped_quickstart_resumes_what_version_1_began(tmp_path: Path) -> None:
    shutil.copy(STORED["quickstart"], tmp_path / "config.json")
    check_config(parse([QUICKSTART, "--config.hang_seconds=5"]).config, tmp_path)
    changed = parse([QUICKSTART, "--config.seed=3", "--config.stage.rl.loss.name=grpo"]).config
    with pytest.raises(UserError, match=r"another configuration \(seed, stages\[3\]\.rl\.loss"):
        check_config(changed, tmp_path)


@pytest.fixture
def version_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose streams say `attempts` for `retries`, draw more, and can be `fair`."""
    kept = [
        (f.name, typing.get_type_hints(StreamConfig)[f.name], f)
        for f in dataclasses.fields(StreamConfig)
        if f.name not in ("retries", "group_size")
    ]
    new = [("attempts", int, 3), ("group_size", int, 16), ("fair", bool, False)]
    stream = dataclasses.make_dataclass("StreamConfig", [*kept, *new], frozen=True)
    monkeypatch.setattr(config_module, "StreamConfig", stream)
    for module in (config_module, migrations):
        monkeypatch.setattr(module, "SCHEMA_VERSION", 3)

    def respell(raw: dict[str, Any]) -> None:
        rename(raw, "stages.rl.stream.retries", "attempts")

    step = Migration({"stages.rl.stream.group_size": 8}, respell)
    monkeypatch.setitem(migrations.MIGRATIONS, 2, step)


def of_version_3(raw: dict[str, Any], **stream: Any) -> ExperimentConfig:
    """What a user of version 3 writes who wants what `raw`, of an earlier version, says."""
    raw = migrations.migrate(raw)
    for stage in raw["stages"]:
        if "rl" in stage:
            stage["rl"]["stream"] |= stream
    return config_from_json(raw)


@pytest.mark.usefixtures("version_3")
@pytest.mark.parametrize("name", STORED)
def test_a_config_of_an_older_version_is_migrated_before_it_is_compared(
    name: str, tmp_path: Path
) -> None:
    raw = json.loads(STORED[name].read_text())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    check_config(of_version_3(raw), tmp_path)
    at = next(i for i, stage in enumerate(raw["stages"]) if stage["kind"] == "rl")
    for key, value in (("attempts", 9), ("group_size", 16), ("fair", True)):
        with pytest.raises(UserError, match=rf"\(stages\[{at}\]\.rl\.stream\.{key} differ\)"):
            check_config(of_version_3(raw, **{key: value}), tmp_path)
    assert json.loads(file.read_text()) == raw, "the file stays as it was written"


@pytest.mark.usefixtures("version_3")
def test_a_key_that_is_absent_had_the_default_of_its_own_version(tmp_path: Path) -> None:
    raw = json.loads(STORED["async"].read_text())
    wanted = of_version_3(raw, group_size=8)
    del raw["stages"][0]["rl"]["stream"]["group_size"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    check_config(wanted, tmp_path)
    assert read_config(tmp_path) == wanted
    with pytest.raises(UserError, match="group_size differ"):  # version 3's own default
        check_config(of_version_3(raw, group_size=16), tmp_path)


@pytest.mark.usefixtures("version_3")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema_version": 4}, ["schema version 4", "reads 3", "upgrade agentcpm_jax"]),
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
    wanted = of_version_3(raw)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw | change))
    with pytest.raises(UserError) as error:
        check_config(wanted, tmp_path)
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
