"""What outside parts lack is said in one line, before the first stage, with exit code 2."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sqlite3
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web

from tests.doubles.played_endpoint import content, honest, played
from tests.doubles.toy_pool import QUICK

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
import train as launch_train

from agentcpm_jax.config import ExperimentConfig, RLStage, SFTStage, Stage
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.server import EngineServer, ServerConfig
from agentcpm_jax.engine.serving import ServedLocal
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.pool.config import PoolConfig
from agentcpm_jax.rewards.judge import JudgeConfig
from agentcpm_jax.run import doctor
from agentcpm_jax.run.commandline import Command, parse
from agentcpm_jax.run.doctor import Finding, check, examine
from agentcpm_jax.run.engines import weights_place
from agentcpm_jax.types import UserError
from tests.doubles.fault_server import FaultServer

TINY = ["--config=configs/tiny.py:async"]


def configured(rl: RLStage | None = None) -> ExperimentConfig:
    config = parse(TINY).config
    stage = config.stages[0]
    assert stage.rl is not None
    return replace(config, stages=(replace(stage, section=rl or stage.rl),))


def with_judge(url: str, **changes) -> ExperimentConfig:
    judge = JudgeConfig(url=url, models=("m",), key_env=None, timeout=20.0, **changes)
    return configured(RLStage(grader="judge", judge=judge))


def with_pool(*urls: str, **changes) -> ExperimentConfig:
    pool = PoolConfig(**vars(QUICK) | {"urls": urls, "control_timeout": 60.0} | changes)
    return configured(RLStage(pool=pool))


def findings(config: ExperimentConfig, workdir: Path) -> dict[str, Finding]:
    return {f.part: f for f in examine(config, workdir)}


# --- the command line -------------------------------------------------------------------------


def test_the_doctor_alone_says_a_line_per_part_and_starts_nothing(tmp_path: Path, capsys) -> None:
    flags = [*TINY, f"--workdir={tmp_path / 'run'}"]
    assert launch_train.main([*flags, "--doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    parts = [line.split(":")[0].split() for line in lines]
    assert parts == [
        ["ok", "disk"],
        ["ok", "model"],
        ["ok", "tokenizer"],
        ["ok", "tools", "of", "rl"],
        ["ok", "database"],
    ]
    assert "search answers ok" in lines[3]
    assert re.search(r"ids, sha256 [0-9a-f]{12}; template sha256 [0-9a-f]{12}$", lines[2])
    assert not (tmp_path / "run").exists() and list(tmp_path.iterdir()) == []


def test_a_launch_is_stopped_by_what_it_needs(tmp_path: Path, capsys) -> None:
    flags = [*TINY, f"--workdir={tmp_path}", "--config.stage.rl.pool.urls=('http://127.0.0.1:9',)"]
    flags += ["--config.stage.rl.pool.start_timeout=0.2"]
    assert launch_train.main(flags) == 2
    captured = capsys.readouterr()
    assert "FAIL  pool of rl: no worker of the pool could be used" in captured.out
    assert captured.err.startswith("error: 1 of the checks failed; mend what FAIL names, or launch")
    assert list(tmp_path.iterdir()) == []  # also no weights are left


def test_a_healthy_launch_says_nothing_and_looks_at_little(tmp_path: Path) -> None:
    said: list[str] = []
    command = parse([*TINY, f"--workdir={tmp_path}"])
    assert check(command, said.append) is False
    assert said == []
    assert {f.part for f in examine(command.config, tmp_path, thorough=False)} == {
        "disk",
        "database",
    }


def test_it_can_be_switched_off(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *a, **k: pytest.fail("examined"))
    command = parse([*TINY, f"--workdir={tmp_path}", "--nodoctor"])
    assert command.doctor is False and check(command, print) is False
    assert parse(TINY).doctor is None and parse([*TINY, "--doctor"]).doctor is True


def test_a_tool_that_hangs_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.05)
    finding = findings(replace(configured(), tools=()), tmp_path)["tools of rl"]
    assert finding.ok

    class Hanging:
        def schemas(self):
            return [{"function": {"name": "browse", "parameters": {"properties": {}}}}]

        async def call(self, name, arguments):
            await asyncio.Event().wait()

        async def close(self): ...

    async def open_hanging(meta, key):
        return Hanging()

    monkeypatch.setattr(doctor, "make_tools", lambda names: (open_hanging, ()))
    finding = findings(configured(), tmp_path)["tools of rl"]
    assert not finding.ok and "browse has not answered within 0.05 s" in finding.text


def test_a_run_can_begin_without_a_part_that_it_may_wait_for(tmp_path: Path, monkeypatch) -> None:
    absent = Finding("pool of rl, http://b", False, "joining: unreachable", needed=False)
    monkeypatch.setattr(doctor, "examine", lambda *a, **k: [absent])
    said: list[str] = []
    command = Command(configured(), tmp_path)
    assert check(command, said.append) is False and said == [str(absent)]
    with pytest.raises(UserError, match=r"1 of the checks failed; mend what FAIL names$"):
        check(command._replace(doctor=True), said.append)


# --- disk, database ---------------------------------------------------------------------------


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = findings(configured(), tmp_path / "run")["disk"]
    assert not found.ok
    assert re.search(r"1.00 MB free at .*, about 23.47 MB needed; free some space", found.text)


def test_finished_stages_are_not_examined(tmp_path: Path) -> None:
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "DONE").touch()
    assert findings(with_judge("http://127.0.0.1:9/v1"), tmp_path).keys() == {
        "disk",
        "model",
        "tokenizer",
        "database",
    }


def test_a_database_that_another_process_writes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "LOCK_SECONDS", 0.05)
    with contextlib.closing(sqlite3.connect(tmp_path / "experience.db", isolation_level=None)) as c:
        c.execute("CREATE TABLE t (x)")
        assert findings(configured(), tmp_path)["database"].ok
        c.execute("BEGIN EXCLUSIVE")
        found = findings(configured(), tmp_path)["database"]
    assert not found.ok and "database is locked; another program (fuser " in found.text
    tables = sqlite3.connect(tmp_path / "experience.db")
    with contextlib.closing(tables):
        assert tables.execute("SELECT name FROM sqlite_master").fetchall() == [("t",)]


def test_a_server_that_is_down_is_named_without_its_password(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secret@127.0.0.1:9/log"
    found = findings(replace(configured(), log_url=url), tmp_path)["database"]
    assert not found.ok and "start the server" in found.text and "secret" not in found.text


def test_a_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    config = configured()
    config = replace(config, model=replace(config.model, vocab_size=512))
    found = findings(config, tmp_path)["tokenizer"]
    assert not found.ok and "the model 512 (vocab_size)" in found.text


# --- the judge --------------------------------------------------------------------------------


@contextlib.contextmanager
def judged(play) -> Iterator[str]:
    """A judge's url; its server runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = played(play)

    def call(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    try:
        yield call(server.__aenter__()).url
    finally:
        call(server.__aexit__(None, None, None))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_judge_is_asked_for_a_verdict(tmp_path: Path) -> None:
    with judged(lambda body, headers: honest(content(body))) as url:
        found = findings(with_judge(url), tmp_path)["judge m"]
    assert found.ok and re.search(r"says right in \d+\.\d s", found.text)


@pytest.mark.parametrize(
    ("play", "message"),
    [
        (lambda body, headers: "Certainly! It is right.", "gives no verdict but 'Certainly!"),
        (lambda body, headers: web.Response(status=401), "refused.*check judge.url, judge.models"),
    ],
)
def test_a_judge_that_cannot_judge(tmp_path: Path, play, message: str) -> None:
    with judged(play) as url:
        found = findings(with_judge(url), tmp_path)["judge m"]
    assert not found.ok and re.search(message, found.text)


# --- the pool ---------------------------------------------------------------------------------


def test_a_pool_takes_weights_and_answers_as_the_trainer(servers, tmp_path: Path) -> None:
    path = str(SHIPPED["shipped:sft"])
    cfg = EngineConfig(slots=4, capacity=384, row_buckets=(), token_buckets=(32,))
    served = ServedLocal(path, cfg)
    front = EngineServer(
        served,
        ServerConfig(port=0),
        chunk=8,
        chat=load_chat(path),
        model=served.describe(path),
    )
    url = servers.start(front)
    # The engine compiles for its first answers: patience for a machine that is busy.
    patient = dict.fromkeys(("attempt_timeout", "control_timeout", "update_timeout"), 300.0)
    config = with_pool(url, "http://127.0.0.1:9", **patient, start_timeout=300.0, max_gap=1e-3)
    found = findings(config, tmp_path)
    served.close()
    assert "pool of rl" not in found, found["pool of rl"]
    good = found[f"pool of rl, {url}"]
    assert good.ok and "log-probs are the trainer's" in good.text
    assert found[f"clock of {url}"].text == "clock within 1 s"
    absent = found["pool of rl, http://127.0.0.1:9"]
    assert not absent.ok and not absent.needed and "unreachable" in absent.text
    assert not [f for f in found.values() if "127.0.0.1" in f.part and f.needed and not f.ok]
    assert front.sessions.version.startswith("doctor-tiny.")
    assert list(tmp_path.iterdir()) == []  # the weights are gone


def test_a_pool_of_another_model_is_refused(servers, tmp_path: Path) -> None:
    url = servers.start(FaultServer(chat=load_chat(SHIPPED["shipped:sft"])))
    found = findings(with_pool(url), tmp_path)["pool of rl"]
    assert not found.ok and found.needed
    assert "wrong model on" in found.text and "\n" not in found.text


def test_weights_where_no_worker_reads_them(servers, tmp_path: Path) -> None:
    config = with_pool("http://127.0.0.1:9", weights_dir="memory://bucket")
    assert "start launch/pool_agent.py" in findings(config, tmp_path)["pool of rl"].text
    assert weights_place(PoolConfig(), Path("x")) == str(Path("x").absolute())
    assert weights_place(PoolConfig(weights_dir="file:///y/"), Path("x")) == "/y"


def test_clocks_that_differ() -> None:
    with pytest.raises(UserError, match="differ by 90 s; set both clocks"):
        doctor._check_skew("http://a", 90.0)
    assert doctor._check_skew("http://a", -3.0) == "clock within 3 s"


def test_a_stage_without_outside_parts_needs_none(tmp_path: Path) -> None:
    config = replace(configured(), stages=(Stage("sft", SFTStage()),))
    assert all(f.ok for f in findings(config, tmp_path).values())
