"""The models that a run reads are of one shape, and the tokenizer is theirs, on resume too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.companions import tokenizer_digest
from agentcpm_jax.run.commandline import Command, check_workdir, parse
from agentcpm_jax.run.start.models import record_tokenizer
from agentcpm_jax.types import UserError

SFT = "shipped:sft"
EVAL = """
stages: [exam]
tokenizer: {tokenizer}
stage:
  exam: {{kind: eval, models: [{model}]}}
"""


def copied(directory: Path, **config: object) -> Path:
    """The shipped agent, with other values in its config.json."""
    shutil.copytree(SHIPPED[SFT], directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


def cached(cache: Path, name: str, **config: object) -> None:
    """The same as a repository of the local Hub cache."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", "ab" * 20
    copied(repository / "snapshots" / commit, **config)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)


def start(*flags: str, config: str = "configs/tiny.py") -> Command:
    """What a launcher does before anything heavy is imported."""
    command = parse([f"--config={config}", *flags])
    check_workdir(command)
    return command


def resume(workdir: Path, tokenizer: Path) -> str:
    """What is said when a run goes on with what now lies in `tokenizer`."""
    with pytest.raises(UserError) as error:
        start(f"--config.tokenizer={tokenizer}", f"--workdir={workdir}")
    return str(error.value)


def test_a_run_goes_on_with_the_tokenizer_it_began_with(tmp_path: Path) -> None:
    used, workdir = copied(tmp_path / "used"), tmp_path / "run"
    workdir.mkdir()
    record_tokenizer(workdir, tokenizer_digest(used))
    start(f"--config.tokenizer={used}", f"--workdir={workdir}")
    template, vocabulary = used / "chat_template.jinja", used / "tokenizer.json"
    before = template.read_text()
    template.write_text(before + " ")
    said = resume(workdir, used)
    assert f"tokenizer {used} (its ids or its chat template)" in said and "restore it" in said
    template.write_text(before)
    text, more = vocabulary.read_text(), Tokenizer.from_file(str(vocabulary))
    more.add_tokens(["<more>"])
    more.save(str(vocabulary))
    assert "is not the one that the run in" in resume(workdir, used)
    vocabulary.write_text(text)
    start(f"--config.tokenizer={used}", f"--workdir={workdir}")


def test_the_worlds_tokenizer_is_named_as_such(tmp_path: Path) -> None:
    model = copied(tmp_path / "model", eos_token_id=[518, 543])
    with pytest.raises(UserError, match="no token of the tokenizer of the offline world; use"):
        start(f"--config.stage.rl.init_from={model}", f"--workdir={tmp_path / 'run'}")


def test_every_source_may_be_a_name_of_the_hub_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    cached(tmp_path / "hub", "org/tiny")
    rope = {"rope_type": "default", "rope_theta": 5e5}
    cached(tmp_path / "hub", "org/turned", rope_theta=5e5, rope_parameters=rope)
    start("--config.stage.rl.init_from=org/tiny", "--config.tokenizer=org/tiny")
    quickstart = "configs/quickstart.py"
    start("--config.base=org/tiny", "--config.stage.merge.general=org/tiny", config=quickstart)
    for flag in ("base", "stage.merge.general", "stage.rl.init_from"):
        with pytest.raises(UserError, match=r"says rope_theta 500000.0, .* 10000.0"):
            start(f"--config.{flag}=org/turned", config=quickstart)
    Path("exam.yaml").write_text(EVAL.format(model="org/turned", tokenizer="org/turned"))
    cfg = start(config="exam.yaml").config
    assert cfg.model.rope_theta == 5e5, "an evaluation alone takes what it finds"
    with pytest.raises(UserError, match=r"models--org--none"):
        start("--config.stage.exam.models=('org/none',)", config="exam.yaml")


def test_a_stage_that_reads_no_init_from_refuses_it() -> None:
    with pytest.raises(UserError, match=r"eval.init_from='org/tiny' is not read .*eval.models"):
        parse(["--config=configs/quickstart.py", "--config.stage.eval.init_from=org/tiny"])
