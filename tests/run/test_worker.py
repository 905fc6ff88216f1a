"""Workers claim, run and hand in groups; the trainer reads them from the log and decides."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.rollout.config import WorkerConfig
from agentcpm_jax.rollout.groups import ClaimedGroups
from agentcpm_jax.rollout.stream import BreakerOpen, Stream
from agentcpm_jax.rollout.worker import ClaimWorker
from agentcpm_jax.run.commandline import parse
from agentcpm_jax.run.worker import WorkerThread, run_worker
from agentcpm_jax.types import Task, Trajectory, UserError
from tests.rollout.stream_world import SMALL, World, check_bounds, finish, task

CFG = replace(SMALL, retries=5)


class Team:
    """A trainer without a policy and workers in threads, on one log."""

    def __init__(self, log: ExperienceLog, world: World, cfg=CFG) -> None:
        self.log, self.world, self.seen = log, world, []
        self.groups = ClaimedGroups(
            log, "rl", lambda: world.version, lambda: self.seen.append(None)
        )
        self.stream = Stream(log, "rl", task, absent, finish, cfg, groups=self.groups)
        self.workers = [self.worker(cfg) for _ in range(2)]
        self.threads = [WorkerThread(worker, self.groups.fail) for worker in self.workers]

    def worker(self, cfg, lease: float = 60.0) -> ClaimWorker:
        async def have_version(version: int) -> None:
            assert self.world.version >= version

        return ClaimWorker(
            self.log, "rl", self.world.run, cfg, groups=3, lease=lease, have_version=have_version
        )

    def __enter__(self) -> Team:
        for thread in self.threads:
            thread.start()
        self.stream.start(self.world.version)
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.stop()
        for thread in self.threads:
            thread.stop()


async def absent(task: Task, issue_id: int, sample: int, attempt: int) -> Trajectory:
    raise AssertionError("the trainer of claimed groups samples nothing itself")


def train(team: Team, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        assert team.stream.next_step_segments(step)
        team.world.version = step + 1
        team.stream.set_version(step + 1)


def test_workers_share_the_groups_and_the_bounds_hold(tmp_path: Path) -> None:
    with ExperienceLog.open(tmp_path / "e.db") as log:
        with Team(log, World(faults=0.15)) as team:
            train(team, 0, 6)
        check_bounds(log, CFG, 6)
        handed_in = [worker.delivered for worker in team.workers]
        settled = log.counts()["state"]
        assert sum(handed_in) >= settled["shipped"] + settled["dropped"]
        assert len(team.seen) >= 6 * CFG.batch_groups
        assert log.claims.live("rl") == {}  # those who left have given everything back


def test_a_new_trainer_takes_over_what_workers_have(tmp_path: Path) -> None:
    with ExperienceLog.open(tmp_path / "e.db") as log:
        world = World()
        with Team(log, world) as team:
            train(team, 0, 2)
        left = {issue.issue_id for issue in log.issues("rl", states=["issued"])}
        assert left, "nothing was in flight: the test proves nothing"
        with Team(log, world) as team:
            train(team, 2, 4)
        check_bounds(log, CFG, 6)
        states = {issue.issue_id: issue.state for issue in log.issues("rl")}
        assert {states[i] for i in left} <= {"shipped", "dropped", "ready"}


def test_a_dead_workers_groups_are_finished_by_others(tmp_path: Path) -> None:
    """Its lease is over, its recorded samples are kept, its late writes are refused."""
    with ExperienceLog.open(tmp_path / "e.db") as log:
        issue_id = log.issue("rl", "train", task(0), 0, 0)
        log.claims.offer("rl", issue_id, 0)
        world = World()
        assert log.claims.take("rl", "dead", 1, -1.0)
        log.record_trajectory(_sampled(world, issue_id), "dead")
        before = log.load_group(issue_id).trajectories[0]
        with Team(log, world) as team:
            train(team, 0, 1)
        first = log.load_group(issue_id).trajectories[0]
        assert first.segments[0].ids.tobytes() == before.segments[0].ids.tobytes()
        assert len(log.load_group(issue_id).trajectories) == CFG.group_size


def _sampled(world: World, issue_id: int) -> Trajectory:

    found = asyncio.run(world.run(task(0), issue_id, 0, 0))
    return replace(found, issue_id=issue_id, sample=0, attempt=0)


def test_a_workers_failure_reaches_the_trainer(tmp_path: Path) -> None:
    cfg = replace(SMALL, retries=0, breaker=4)
    with ExperienceLog.open(tmp_path / "e.db") as log:
        with (
            Team(log, World(faults=1.0), cfg) as team,
            pytest.raises(BreakerOpen, match="4 samples"),
        ):
            train(team, 0, 1)
        assert log.claims.live("rl") == {}


def test_a_worker_ends_when_it_is_over_and_gives_back(tmp_path: Path) -> None:
    with ExperienceLog.open(tmp_path / "e.db") as log:
        issue_id = log.issue("rl", "train", task(0), 0, 0)
        log.claims.offer("rl", issue_id, 0)
        began, world = threading.Event(), World()

        async def endless(*key: object) -> Trajectory:
            began.set()
            await asyncio.sleep(3600)
            raise AssertionError

        world.run = endless  # type: ignore[method-assign]
        team = Team(log, world)
        worker = WorkerThread(team.worker(CFG), team.groups.fail)
        worker.start()
        assert began.wait(30)
        started = time.monotonic()
        worker.stop()
        assert time.monotonic() - started < 60
        assert log.claims.live("rl") == {} and team.groups.error is None
        assert log.claims.take("rl", "next", 1, 60.0)[0].issue_id == issue_id


def config(*flags: str):
    return parse(["--config=configs/tiny.py:async", *flags]).config


SERVER = "--config.log_url=postgresql+psycopg://localhost/nothing"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "SQLite log is for one process; use PostgreSQL"),
        ((SERVER, "--config.stage.rl.stream.deterministic=True"), "deterministic=True runs in one"),
        ((SERVER,), "holds no run; start the trainer"),
    ],
)
def test_what_no_worker_can_serve(tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run_worker(config(*flags), tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_stages_without_rollouts_and_bad_limits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no RL stage"):
        run_worker(replace(config(SERVER), stages=()), tmp_path)
    with pytest.raises(UserError, match=r"workers\.lease=0\.1; it is at least 1"):
        WorkerConfig(lease=0.1)
    with pytest.raises(UserError, match="trainer_groups=-2"):
        config("--config.stage.rl.workers.trainer_groups=-2")
