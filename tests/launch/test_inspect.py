"""The command as its user meets it: outcomes by exit code, every mistake one line."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentcpm_jax.run.commandline import CHECKOUT
from tests.run.recorded_run import finished

sys.path.insert(0, str(CHECKOUT / "launch"))
import inspect_run

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs the command, which must fail as a user error; returns its line."""

    def run(*argv: object) -> str:
        assert inspect_run.main([str(a) for a in argv]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished(), tmp_path / "run"))


def test_missing_runs(fails: Fails, tmp_path: Path, run: Path) -> None:
    for command in (["replay", "none", "--step", 1], ["why", "none", 1], ["export", "none", "o"]):
        line = fails(*command)
        assert "no run in none" in line and "--workdir" in line
    shutil.rmtree(run / "rl" / "checkpoints")
    (run / "experience.db").unlink()
    assert "experience.db is missing" in fails("why", run, 1)
    (run / "config.json").write_text("{")
    assert "config.json is damaged" in fails("why", run, 1)
    assert not (tmp_path / "none").exists() and not (run / "experience.db").exists()


def test_unknown_steps_stages_issues_and_samples(fails: Fails) -> None:
    run = finished()
    assert "no step 9" in (line := fails("replay", run, "--step", 9)) and "1 to 4" in line
    assert "no RL stage 'sft'" in fails("replay", run, "--step", 1, "--stage", "sft")
    assert "no issue 77" in (line := fails("why", run, 77)) and "1 to 8" in line
    assert "no sample 8" in fails("why", run, 1, "--sample", 8)


def test_malformed_commands(fails: Fails, tmp_path: Path) -> None:
    run = finished()
    assert "'x' is not a whole number" in fails("why", run, "x")
    assert "0: the first step is 1" in fails("replay", run, "--step", 0)
    assert "'-3' is not a whole number" in fails("replay", run, "--step=-3")
    assert "--step" in fails("replay", run)
    assert "'explain'" in fails("explain", run)
    assert "--deep" in fails("export", run, tmp_path / "out", "--deep")
    assert f"{tmp_path} exists" in fails("export", run, tmp_path)


def test_other_schema_versions(fails: Fails, run: Path) -> None:
    config = run / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"schema_version": 99}))
    assert "schema version 99" in (line := fails("why", run, 1)) and "upgrade" in line
    config.write_text(json.dumps(raw | {"novel": 1}))
    assert "unknown config key config.novel" in fails("why", run, 1)
    config.write_text(json.dumps(raw))
    with sqlite3.connect(run / "experience.db") as log:
        log.execute("update meta set value = '99' where key = 'schema_version'")
    for command in (["why", run, 1], ["export", run, run / "out"], ["replay", run, "--step", 1]):
        assert "schema version 99" in fails(*command)


def test_damaged_and_missing_checkpoints(fails: Fails, run: Path) -> None:
    for file in (run / "rl" / "checkpoints" / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = fails("replay", run, "--step", 3)
    assert "checkpoints/2 is damaged: " in line and "bytes" in line


def test_a_log_that_ends_before_the_metrics(fails: Fails, run: Path) -> None:
    with sqlite3.connect(run / "experience.db") as log:
        log.execute("delete from shipped where step >= 2")
    assert "step 4 of stage 'rl' is not in" in fails("replay", run, "--step", 4)


def test_outcomes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_run.main(["why", str(run), "1", "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    assert inspect_run.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "tokens.parquet: " in capsys.readouterr().out
    metrics = run / "rl" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[2]["train/grad_norm"] += 1.0
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert inspect_run.main(["replay", str(run), "--step", "3"]) == 1
    out = capsys.readouterr().out
    assert "NOT equal" in out and "train/grad_norm: recorded" in out


def test_a_run_whose_log_is_gone_is_read_from_its_last_checkpoint(run: Path) -> None:
    for file in run.glob("experience.db*"):
        file.unlink()
    assert inspect_run.main(["export", str(run), str(run / "out")]) == 0
    assert (run / "out" / "shipped.parquet").is_file()
    assert not (run / "experience.db").exists(), "only a copy of the snapshot is opened"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_run.main(["--help"]) == 0
    assert "replay RUN --step 12" in capsys.readouterr().out
    assert inspect_run.main([]) == 2
