"""What `--config` may name, and what is said about a name that is nearly right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from agentcpm_jax.config import to_json
from agentcpm_jax.run.commandline import parse
from agentcpm_jax.types import UserError

YAML = """
stages: [rl]
seed: 4
episode: {max_context: 300}
stage:
  rl: {kind: rl, init_from: "shipped:sft", optimizer: {lr: 1e-4, eps: 1e-08}}
"""


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(argv)
    return str(error.value)


def test_the_file_may_be_a_word_of_its_own() -> None:
    flags = ["--config.seed=3", "--config", "configs/tiny.py:async", "--workdir=x"]
    assert parse(flags) == parse([flags[0], "--config=configs/tiny.py:async", "--workdir=x"])
    assert "give one --config=FILE" in refused("--config")


@pytest.mark.parametrize("config", ["configs/quickstart.py", "configs/rl_qwen3_4b.py:runlocal"])
def test_a_stored_configuration_is_read_and_overridden(config: str, tmp_path: Path) -> None:
    first = parse([f"--config={config}"]).config
    (tmp_path / "config.json").write_text(json.dumps(to_json(first)))
    for name in (tmp_path, tmp_path / "config.json"):
        assert parse([f"--config={name}"]).config == first
    changed = parse([f"--config={tmp_path}", "--config.stage.rl.shape.steps=77"]).config
    assert [s.rl.shape.steps for s in changed.stages if s.rl] == [77]
    assert "no variants" in refused(f"--config={tmp_path / 'config.json'}:smoke")


def test_yaml_leaves_out_what_has_its_default(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(YAML)
    config = parse([f"--config={tmp_path / 'my.yaml'}", "--config.tokenizer=abc"]).config
    rl = config.stages[0].rl
    assert rl is not None and (rl.optimizer.lr, rl.optimizer.eps) == (1e-4, 1e-8)
    assert (config.seed, config.episode.max_context, config.tokenizer) == (4, 300, "abc")


def test_a_document_leaves_the_shape_to_the_checkpoint(tmp_path: Path) -> None:
    """To the one of the flags, and for a plan to a published one."""
    (tmp_path / "my.yaml").write_text(YAML.replace("shipped:sft", "Qwen/Qwen3-4B"))
    file = f"--config={tmp_path / 'my.yaml'}"
    assert parse([file, "--explain"]).config.model.num_layers == 36
    assert parse([file, "--config.stage.rl.init_from=shipped:sft"]).config.model.num_layers == 3
    with_one = f"{YAML}model: {{num_layers: 4}}\n"
    (tmp_path / "my.yaml").write_text(with_one)
    assert "config.model.num_layers is 4" in refused(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (YAML.replace("eps", "epss"), r"config.stage.rl.optimizer.epss; did you mean 'eps'"),
        (YAML.replace("[rl]", "[r1]"), "did you mean 'rl'"),
        (YAML.replace("kind: rl", "kind: rll"), "did you mean 'rl'"),
        (YAML.replace("[rl]", "rl"), "config.stages='rl' is not a list"),
        (YAML.replace("seed: 4", "seed: 4\nseed: 5"), "the key 'seed' stands twice"),
        (YAML.replace("seed: 4", "seed: !!python/object:os.system 1"), "cannot be read"),
        ("stages: [rl]\nstage: [rl]", "config.stage=['rl']; expected a section"),
        ("stages: [rl]\nstage: {rl: 3}", "config.stage.rl=3; expected a section"),
        ("- a", "holds no keys"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_mistake_in_a_document_names_the_file(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    found = refused(f"--config={file}")
    assert str(file) in found and said in found


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.json", '{"seed": 1, "seed": 2}', "'seed' stands twice"),
        ("c.json", "null", "holds no keys"),
        ("c.toml", "seed = 1", "is none of .py, .yaml, .yml, .json"),
        ("c", "seed: 1", "is none of .py"),
        ("c.py", "seed = 1", "has no get_config"),
        ("c.py", "def get_config(:", "is not Python"),
    ],
)
def test_what_is_no_config_file_is_said(name: str, text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert said in refused(f"--config={tmp_path / name}")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config", "--workdir=x"], "give one --config=FILE"),
        (["--config=configs/tiny.py", "--config.workdir="], "workdir is empty"),
        (["--config=configs/tiny.py", "--explain", "--prices=absent"], "--prices=absent: no such"),
        (["--config=configs/tiny.py", "--config.stagess.rl.x=1"], "did you mean 'stages'"),
        (["--config=configs/tiny.py", "--config.episode.temprature=1"], "'temperature'"),
        (["--config=configs/quickstart.py", "--config.stage.merge.method=tiess"], "mean 'ties'"),
        (
            ["--config=configs/quickstart.py", "--config.stage.merge.soup=('stage:stf',)"],
            "did you mean 'sft'",
        ),
        (["--config=configs/quickstart.py:smok"], "'smok' of .*did you mean 'smoke'"),
        (["--config=configs/tiny.py:asinc"], "did you mean 'async'"),
        (["--config=configs/lora_qwen3_4b.py:T4"], "did you mean 't4'|known: t4, runlocal"),
        (["--config=configs/quickstar.py"], "did you mean 'configs/quickstart.py'"),
        (
            ["--config=configs/quickstart.py", "--config.stage.merge.alpa=1"],
            r"config\.stage\.merge\.alpa: .*did you mean 'alpha'",
        ),
        (["--config=configs/tiny.py", "--config.stage.rll.x=1"], "did you mean 'rl'"),
        (["--config=configs/tiny.py", "--config.sed=1"], "config.sed: .*did you mean 'seed'"),
        (["--config=configs/tiny.py", "--config.seed.x=1"], "config.seed is a value"),
        (["--config=configs/tiny.py", "--slice=v5p32"], "did you mean 'v5p-32'"),
        (
            ["--config=configs/quickstart.py", "--config.stages=('base', 'stf')"],
            "config.stage.stf; did you mean 'sft'",
        ),
        (
            ["--config=configs/quickstart.py", "--config.stage.eval.models=('bas',)"],
            "did you mean 'base'",
        ),
        (["--config=configs/tiny.py", "--config.stage.rl.loss.name=grpoo"], "did you mean 'grpo'"),
    ],
)
def test_the_nearest_name_is_offered(argv: list[str], said: str) -> None:
    assert re.search(said, refused(*argv)), refused(*argv)


@pytest.mark.parametrize(
    ("body", "variant", "known"),
    [
        ("def get_config():\n    return c()", "x", "it has none"),
        ("def get_config(v=''):\n    if v in ('a1', 'b1'): pass\n    return c()", "a2", "'a1'"),
        (
            "def get_config(v=''):\n    match v:\n        case 'a1' | 'b1': pass\n    return c()",
            "b2",
            "'b1'",
        ),
        ("def get_config(v=''):\n    d = c()\n    d.name = v or 'n'\n    return d", "free", ""),
    ],
)
def test_variants_are_read_from_the_file(
    body: str, variant: str, known: str, tmp_path: Path
) -> None:
    """A `get_config` that uses its argument in any other way knows best what it takes."""
    stage = "d.stages = ('rl',); d.stage.rl = stage_dict('rl', 'shipped:sft')"
    head = "from agentcpm_jax.config import default_config, stage_dict\n"
    file = tmp_path / "mine.py"
    file.write_text(f"{head}def c():\n    d = default_config(); {stage}\n    return d\n{body}\n")
    if known:
        assert known in refused(f"--config={file}:{variant}")
    else:
        assert parse([f"--config={file}:{variant}"]).config.name == variant
