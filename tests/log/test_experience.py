"""The log: exact to the bit, one terminal state per issue, nothing lost or doubled by a kill."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from agentcpm_jax import database
from agentcpm_jax.database import LogBroken, LogUnavailable
from agentcpm_jax.log import schema
from agentcpm_jax.log.codec import (
    decode_credit,
    decode_trajectory,
    encode_credit,
    encode_trajectory,
)
from agentcpm_jax.log.experience import SET_ASIDE, ExperienceLog
from agentcpm_jax.log.schema import ShipEntry
from agentcpm_jax.types import (
    Credit,
    Decision,
    Provenance,
    Segment,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    Turn,
    TurnFlag,
    UserError,
    Verdict,
)
from tests.doubles.full_disk import files_up_to


def task(n: int = 0) -> Task:
    return Task(f"question {n}?", ("a", "ü"), "hop2", meta={"script": [n]})


def segment(rng: np.random.Generator, n: int, version: int = 3) -> Segment:
    provenance = np.repeat(rng.integers(0, 6, n // 10 + 1), 10)[:n].astype(np.uint8)
    sampled = provenance == Provenance.SAMPLED
    logprob = np.where(sampled, -rng.exponential(size=n), np.nan).astype(np.float32)
    ids = rng.integers(0, 151_000, n).astype(np.int32)
    return Segment(ids, provenance, logprob, np.where(sampled, version, -1).astype(np.int32))


def fork(rng: np.random.Generator, parent: Segment, index: int, cut: int, n: int) -> Segment:
    """What a context edit leaves: the prefix as history without log-probabilities, then more."""
    new = segment(rng, n)
    shown = parent.provenance[:cut]
    history = np.where(shown == Provenance.SAMPLED, Provenance.HISTORY, shown).astype(np.uint8)
    return Segment(
        np.concatenate([parent.ids[:cut], new.ids]),
        np.concatenate([history, new.provenance]),
        np.concatenate([np.full(cut, np.nan, np.float32), new.logprob]),
        np.concatenate([np.full(cut, -1, np.int32), new.version]),
        parent_segment=index,
        shared_prefix_len=cut,
        edit_reason="summarised",
    )


def trajectory(issue_id: int = 1, sample: int = 0, attempt: int = 0, seed: int = 0) -> Trajectory:
    rng = np.random.default_rng(seed)
    first = segment(rng, 50)
    odd = Segment(  # a "fork" whose prefix is not its parent's: stored whole
        first.ids[::-1].copy(),
        first.provenance,
        np.full(50, np.frombuffer(b"\x01\x00\xc0\x7f", "<f4")[0], np.float32),  # another NaN
        first.version,
        parent_segment=0,
        shared_prefix_len=20,
    )
    calls = (
        ToolCall("search", {"query": ["x", None, 1.5]}, span=(3, 9)),
        ToolCall("", None, error="bad_json", message="\ud800\0"),
    )
    results = (ToolResult(ToolStatus.TOOL_ERROR, "nicht gefunden \0", 0.25),)
    turns = (Turn(0, 0, 4, 50, calls, results, (TurnFlag.FORMAT_ERROR, TurnFlag.NO_CALL)),)
    return Trajectory(
        segments=(first, fork(rng, first, 0, 30, 25), odd, segment(rng, 0)),
        turns=turns,
        stop=StopReason.MAX_TURNS,
        issue_id=issue_id,
        sample=sample,
        attempt=attempt,
        answer="a \ud800 b\0",
        verdict=Verdict.WRONG,
        reward=0.1,
        error="half\0",
        seconds=1.25,
    )


def assert_same(a: Trajectory, b: Trajectory) -> None:
    assert len(a.segments) == len(b.segments)
    for x, y in zip(a.segments, b.segments, strict=True):
        for f in dataclasses.fields(Segment):
            u, v = getattr(x, f.name), getattr(y, f.name)
            if isinstance(u, np.ndarray):
                assert u.dtype == v.dtype and u.tobytes() == v.tobytes(), f.name
            else:
                assert u == v, f.name
    strip = {"segments": ()}
    assert dataclasses.replace(a, **strip) == dataclasses.replace(b, **strip)


def ready(log: ExperienceLog, n: int, stage: str = "rl") -> list[int]:
    ids = [log.issue(stage, "train", task(k), 0, k) for k in range(n)]
    for i in ids:
        log.record_trajectory(trajectory(i, seed=i))
        log.finish_group(i, "ready")
    return ids


def entries(ids: list[int]) -> list[ShipEntry]:
    credit = Credit(np.linspace(-1, 1, 50, dtype=np.float32), np.arange(50) % 3 > 0)
    return [ShipEntry(i, 0, 0, credit) for i in ids]


# ---- blobs


def test_blobs_are_exact_to_the_bit() -> None:
    """Foreign NaN patterns, forks, empty segments, NULs and lone surrogates included."""
    traj = trajectory()
    assert_same(traj, decode_trajectory(encode_trajectory(traj)))
    nan = dataclasses.replace(traj, reward=math.nan)
    assert math.isnan(decode_trajectory(encode_trajectory(nan)).reward or 0.0)
    credit = decode_credit(encode_credit(np.float32([0.1, -0.0, np.inf]), np.bool_([1, 0, 1])))
    assert credit.advantage.tobytes() == np.float32([0.1, -0.0, np.inf]).tobytes()
    assert credit.keep.tolist() == [True, False, True] and credit.keep.dtype == bool


def test_a_flipped_bit_is_no_other_trajectory() -> None:
    """Nor another credit; a blob of an older release has no checksum and is read."""
    blob = encode_trajectory(trajectory())
    credit = encode_credit(np.float32([0.1, 0.2]), np.bool_([1, 0]))
    assert_same(trajectory(), decode_trajectory(blob[:-4]))
    for whole, decode in ((blob, decode_trajectory), (credit, decode_credit)):
        for at in range(len(whole)):
            damaged = whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]
            with pytest.raises((ValueError, struct.error, zlib.error)):
                decode(damaged)
                pytest.fail(f"byte {at} of {len(whole)}")


def test_storage_is_linear_in_unique_tokens() -> None:
    """A hundred forks of one growing context cost what its tokens cost, not their square."""
    rng = np.random.default_rng(0)
    whole = segment(rng, 8000)
    one = len(encode_trajectory(Trajectory((whole,), (), StopReason.ANSWERED)))
    segments = [Segment(*(getattr(whole, n)[:80] for n in ("ids", "provenance")), *lower(whole))]
    for turn in range(1, 100):
        parent = segments[-1]
        segments.append(fork(rng, parent, turn - 1, len(parent), 80))
    forked = Trajectory(tuple(segments), (), StopReason.ANSWERED)
    blob = encode_trajectory(forked)
    assert_same(forked, decode_trajectory(blob))
    assert forked.num_tokens == 8000
    assert len(blob) <= 1.1 * one
    assert one <= 6 * 8000


def lower(whole: Segment) -> tuple[np.ndarray, np.ndarray]:
    return whole.logprob[:80], whole.version[:80]


# ---- the log


def test_a_group_goes_round_and_comes_back(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        first, second = ready(log, 2)
        evaluated = log.issue("rl", "eval", task(7), 0, 0)
        assert (first, second, evaluated) == (1, 2, 3)
        log.record_trajectory(trajectory(evaluated, sample=1))
        log.finish_group(evaluated, "done", decisions=[Decision(1, "length", "too\0long")])
        log.ship("rl", 0, entries([second, first]), [(first, Decision(0, "over_age", "old"))])
    with ExperienceLog.open(log_url) as log:
        batch = log.shipped("rl", 0)
        assert [(s.issue_id, s.sample, s.segment_index) for s in batch] == [(2, 0, 0), (1, 0, 0)]
        assert batch[0].segment.ids.tobytes() == trajectory(seed=2).segments[0].ids.tobytes()
        assert batch[0].credit.advantage.tobytes() == entries([1])[0].credit.advantage.tobytes()
        assert log.last_shipped_step("rl") == 0 and log.last_shipped_step("other") == -1
        assert log.shipped("rl", 1) == []
        group = log.load_group(second)
        assert group.task == task(1) and group.task.uid == task(1).uid
        assert_same(group.trajectories[0], trajectory(second, seed=2))
        (result,) = log.results("rl")
        assert (result.sample, result.verdict, result.reward) == (1, Verdict.WRONG, 0.1)
        assert result.issue.task == task(7) and result.num_turns == 1
        assert log.decisions(evaluated) == [Decision(1, "length", "too\ufffdlong")]
        assert log.decisions(first) == [Decision(0, "over_age", "old")]
        counts = log.counts()
        assert counts["state"] == {"shipped": 2, "done": 1}
        assert log.next_ordinal("rl") == 2


def test_who_looks_at_a_log_needs_no_tables(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        assert log.id_range() is None and list(log.rows("issue")) == []
        first, second = ready(log, 2)
        log.ship("rl", 3, entries([second, first]), [(first, Decision(0, "over_age", "old"))])
        assert log.id_range() == (first, second) and log.find_issue(9) is None
        found = log.find_issue(first)
        assert found is not None and (found.task, found.state) == (task(0), "shipped")
        (found,) = log.credits(first).values()
        assert (found.step, found.ordinal) == (3, 1)
        assert found.credit.advantage.tobytes() == entries([1])[0].credit.advantage.tobytes()
        # A long reading is not in the way of other calls.
        groups = [log.load_group(row["issue_id"]).issue_id for row in log.rows("issue")]
        assert groups == [first, second]
        (row,) = log.rows("decision")
        assert (row["issue_id"], row["filter"], row["reason"]) == (first, "over_age", "old")
        tokens = trajectory(first).num_tokens
        assert log.lengths_and_losses("rl", "over_age") == [(tokens, True), (tokens, False)]
        assert log.lengths_and_losses("rl", "over_age", recent=1) == [(tokens, False)]


def test_each_issue_ends_exactly_once(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        a, b, c = ready(log, 3)
        flying = log.issue("rl", "train", task(), 0, 3)
        log.ship("rl", 0, entries([a]))
        log.drop(b, "over_age")
        with pytest.raises(ValueError, match="step 0 is shipped already"):
            log.ship("rl", 0, entries([c]))
        for ended in (a, b):
            with pytest.raises(ValueError, match=f"issue {ended} is (shipped|dropped)"):
                log.drop(ended, "again")
            with pytest.raises(ValueError, match="not in flight"):
                log.record_trajectory(trajectory(ended))
            with pytest.raises(ValueError, match="cannot become shipped"):
                log.ship("rl", 1, entries([c, ended]))
        with pytest.raises(ValueError, match="cannot become shipped"):
            log.ship("rl", 1, entries([c, flying]))
        # A refused batch leaves nothing behind.
        assert [i.issue_id for i in log.ready("rl")] == [c]
        assert log.last_shipped_step("rl") == 0
        assert [i.issue_id for i in log.issues("rl", states=["issued"])] == [flying]
        with pytest.raises(ValueError, match="empty"):
            log.ship("rl", 1, [])
        with pytest.raises(ValueError, match="unknown"):
            log.drop(99, "never issued")


def test_a_batch_that_cannot_be_trained_is_taken_back_with_its_reason(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        ids = ready(log, 4)
        log.ship("rl", 0, entries(ids[:1]))
        log.ship("rl", 1, entries(ids[1:3]))
        with pytest.raises(ValueError, match="step 0 is not the newest, 1 is"):
            log.set_aside("rl", 0, "too long")
        assert log.set_aside("rl", 1, "a row of 9 tokens") == ids[1:3]
        assert log.shipped("rl", 1) == [] and log.last_shipped_step("rl") == 0
        assert log.counts("rl")["reason"] == {SET_ASIDE: 2}
        said = [log.decisions(i) for i in ids[1:3]]
        assert said == [[Decision(-1, SET_ASIDE, "step 2: a row of 9 tokens")]] * 2
        with pytest.raises(ValueError, match="cannot become"):
            log.drop(ids[1], "again")
        log.ship("rl", 1, entries(ids[3:]))
        assert [s.issue_id for s in log.shipped("rl", 1)] == ids[3:]


def test_the_database_itself_refuses_to_ship_a_segment_twice(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        (issue,) = ready(log, 1)
        log.ship("rl", 0, entries([issue]))
        row = {"issue_id": issue, "sample": 0, "segment": 0, "credit": b"", "stage": "rl"}
        again = sa.insert(schema.shipped).values(**row, step=1, ordinal=0)
        with pytest.raises(sa.exc.IntegrityError), log._write() as conn:
            conn.execute(again)


def test_a_shipped_batch_survives_a_power_cut(tmp_path: Path) -> None:
    """SQLite waits for the disk (2: FULL) when a batch ships, and for that alone (1: NORMAL)."""
    levels: dict[str, int] = {}

    def watch(conn: sa.Connection, cursor: sqlite3.Cursor, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO"):
            pragma = cursor.connection.execute("PRAGMA synchronous")
            levels[statement.split()[2]] = pragma.fetchone()[0]

    sa.event.listen(sa.Engine, "before_cursor_execute", watch)
    try:
        with ExperienceLog.open(tmp_path / "e.db") as log:
            log.ship("rl", 0, entries(ready(log, 1)))
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", watch)
    assert (levels["shipped"], levels["trajectory"], levels["issue"]) == (2, 1, 1)


def test_the_last_attempt_counts_and_a_rerun_forgets_later_ones(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:
        i = log.issue("rl", "train", task(), 0, 0)
        for attempt in range(3):
            log.record_trajectory(trajectory(i, attempt=attempt, seed=attempt))
        assert_same(log.load_group(i).trajectories[0], trajectory(i, attempt=2, seed=2))
        log.record_trajectory(trajectory(i, attempt=0, seed=9))
        assert [t.attempt for t in log.attempts(i)] == [0]
        assert_same(log.load_group(i).trajectories[0], trajectory(i, seed=9))


def test_a_log_of_another_schema_or_no_log_at_all_is_one_clear_line(tmp_path: Path) -> None:
    where = tmp_path / "e.db"
    ExperienceLog.open(where).close()
    with sqlite3.connect(where) as raw:
        raw.execute("UPDATE meta SET value = '7'")
    raw.close()
    with pytest.raises(UserError, match=r"schema version 7, this release reads up to 2; upgrade"):
        ExperienceLog.open(where)
    text = tmp_path / "notes.txt"
    text.write_text("not a database at all, and longer than a header of sixteen bytes")
    with pytest.raises(UserError, match="not a database"):
        ExperienceLog.open(text)
    with pytest.raises(UserError, match="not durable"):
        ExperienceLog.open(":memory:")
    with pytest.raises(UserError, match="nosuch"):
        ExperienceLog.open("nosuch://host/db")


def broken_file(where: Path) -> None:
    where.write_bytes(b"\xaa" * 40_000)


def broken_pages(where: Path) -> None:
    """All but the first, which holds the schema."""
    size = where.stat().st_size
    with where.open("r+b") as file:
        file.seek(16384)
        file.write(b"\xaa" * (size - 16384))


def broken_trajectory(where: Path) -> None:
    with sqlite3.connect(where) as raw:
        (blob,) = raw.execute("SELECT payload FROM trajectory").fetchone()
        raw.execute("UPDATE trajectory SET payload = ?", (blob[:200] + b"!" + blob[201:],))
    raw.close()


def broken_text(where: Path) -> None:
    with sqlite3.connect(where) as raw:
        raw.execute("UPDATE issue SET reason = CAST(x'FFFE' AS TEXT)")
    raw.close()


@pytest.mark.parametrize("damage", [broken_file, broken_pages, broken_trajectory, broken_text])
def test_a_broken_log_points_to_its_snapshot(tmp_path: Path, damage: Callable) -> None:
    where, spare = tmp_path / "e.db", tmp_path / "spare.db"
    with ExperienceLog.open(where) as log:
        i = log.issue("rl", "train", task(0), 0, 0)
        log.record_trajectory(trajectory(i))
        log.snapshot(spare)
    damage(where)
    for found, then in (spare, f"the snapshot {spare} takes its place"), (None, "start again"):
        with pytest.raises(LogBroken) as error, ExperienceLog.open(where, lambda: found) as log:  # noqa: B023
            log.issues("rl")
            log.load_group(i)
        said = str(error.value)
        assert said.startswith(f"experience log {where}: ") and "\n" not in said
        assert f"; move it away (mv {where} {where}.broken), and {then}" in said


def test_a_locked_log_names_the_process_that_holds_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    where = tmp_path / "e.db"
    code = (
        "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(60)"
    )
    with ExperienceLog.open(where) as log:
        command = [sys.executable, "-c", code, str(where)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(LogUnavailable) as error:
                log.issue("rl", "train", task(0), 0, 0)
            other.kill()
        said = str(error.value)
        assert "database is locked" in said and f"process {other.pid} ({sys.executable}" in said
        assert "close it there, or end that process, then the same command resumes" in said
        log.issue("rl", "train", task(0), 0, 0)  # and so it does


def test_a_full_disk_says_so_and_the_log_goes_on_when_there_is_room(tmp_path: Path) -> None:
    where = tmp_path / "e.db"
    with ExperienceLog.open(where) as log:
        with files_up_to(64 << 10), pytest.raises(LogUnavailable) as error:
            for ordinal in range(1000):
                log.issue("rl", "train", task(ordinal), 0, ordinal)
        assert f"experience log {where}: " in str(error.value)
        assert "raise the limit on the size of a file" in str(error.value)
        count = len(log.issues("rl"))
        log.issue("rl", "train", task(0), 0, count)
        assert len(log.issues("rl")) == count + 1


def test_a_log_of_an_older_release_is_read_and_migrated(tmp_path: Path) -> None:
    """The file was written by schema 1, blobs of format 1 included."""
    where = tmp_path / "old.db"
    shutil.copy(Path(__file__).parents[1] / "golden" / "experience" / "schema1.db", where)
    for _ in range(2):
        with ExperienceLog.open(where) as log:
            states = {i.issue_id: i.state for i in log.issues("rl")}
            assert states == {1: "shipped", 2: "shipped", 3: "ready", 4: "issued", 5: "dropped"}
            for issue_id, seed in ((1, 1), (3, 3), (4, 9)):
                (found,) = log.load_group(issue_id).trajectories
                assert_same(found, trajectory(issue_id, seed=seed))
            assert [s.issue_id for s in log.shipped("rl", 0)] == [1, 2]
            assert log.decisions(1) == [Decision(0, "over_age", "old")]
    with ExperienceLog.open(where) as log:
        log.ship("rl", 1, entries([3]))
        log.claims.offer("rl", 4, 0)
        assert [claim.issue_id for claim in log.claims.take("rl", "w", 1, 60.0)] == [4]


def test_ids_have_no_holes_after_a_lost_transaction(log_url: str) -> None:
    """Sampling keys hold the id: a resumed run must give the same ones."""
    with ExperienceLog.open(log_url) as log:
        assert log.issue("rl", "train", task(0), 0, 0) == 1
        with pytest.raises(TypeError):
            log.issue_round(
                "rl", "train", [(task(1), 0, 1), (Task("q", ("a",), meta={"x": {1}}), 0, 2)]
            )
        assert log.issue_round("rl", "train", [(task(1), 0, 1), (task(2), 0, 2)]) == [2, 3]


def test_threads_write_side_by_side(log_url: str) -> None:
    with ExperienceLog.open(log_url) as log:

        def work(k: int) -> None:
            for n in range(5):
                i = log.issue(f"s{k}", "train", task(n), 0, n)
                log.record_trajectory(trajectory(i))
                log.finish_group(i, "ready")
                log.ship(f"s{k}", n, entries([i]))

        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert log.counts()["state"] == {"shipped": 20}
        ids = [i.issue_id for k in range(4) for i in log.issues(f"s{k}")]
        assert sorted(ids) == list(range(1, 21))


# ---- kill -9

WORKER = """
import sys
sys.path.insert(0, {root!r})
from tests.log.test_experience import *
from tests.log.test_experience import ExperienceLog as Log

def speaking(name):
    method = getattr(Log, name)
    def spoken(*args, **kwargs):
        print("begun", flush=True)
        return method(*args, **kwargs)
    setattr(Log, name, spoken)

for name in ("issue_round", "record_trajectory", "finish_group", "ship"):
    speaking(name)
with Log.open(sys.argv[1]) as log:
    for issue in log.issues("rl", states=["issued"]):
        log.record_trajectory(trajectory(issue.issue_id, seed=issue.issue_id))
        log.finish_group(issue.issue_id, "ready")
    while True:
        n = log.next_ordinal("rl")
        ids = log.issue_round("rl", "train", [(task(n + k), 0, n + k) for k in range(3)])
        for i in ids:
            log.record_trajectory(trajectory(i, seed=i))
            if i % 3 == 0:
                log.finish_group(i, "dropped", "zero_variance", [Decision(-1, "var", "0")])
            else:
                log.finish_group(i, "ready")
        batch = [i.issue_id for i in log.ready("rl")][:2]
        step = log.last_shipped_step("rl") + 1
        if len(batch) == 2:
            log.ship("rl", step, entries(batch))
"""


def test_kill_at_random_points_loses_and_doubles_nothing(log_url: str) -> None:
    """R2: after every kill each issue is terminal or resumable, each step whole or absent."""
    root, rnd = Path(__file__).parents[2], random.Random(0)
    code = WORKER.format(root=str(root))
    seen: dict[int, list[int]] = {}
    for _ in range(3):
        worker = subprocess.Popen([sys.executable, "-c", code, log_url], stdout=subprocess.PIPE)
        assert worker.stdout is not None
        for _ in range(rnd.randrange(20, 60)):  # a line per transaction: then it is in another one
            assert worker.stdout.readline() == b"begun\n"
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        with ExperienceLog.open(log_url) as log:
            last = log.last_shipped_step("rl")
            steps = {k: [s.issue_id for s in log.shipped("rl", k)] for k in range(last + 1)}
            assert all(len(ids) == 2 for ids in steps.values())  # no half-shipped step
            assert {k: steps[k] for k in seen} == seen  # R1: what was recorded stays
            seen = steps
            shipped = [i for ids in steps.values() for i in ids]
            assert len(shipped) == len(set(shipped))
            issues = log.issues("rl")
            assert {i.issue_id for i in issues if i.state == "shipped"} == set(shipped)
            assert {i.state for i in issues} <= {"issued", "ready", "shipped", "dropped"}
            assert sorted(i.ordinal for i in issues) == list(range(len(issues)))
            for issue in issues:
                if issue.state != "issued":  # a settled group has its samples
                    assert len(log.load_group(issue.issue_id).trajectories) == 1
                    assert bool(log.decisions(issue.issue_id)) == (issue.state == "dropped")
    assert seen
