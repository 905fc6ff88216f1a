"""The producer: the part of the stream that runs in its event loop.

It issues tasks, keeps groups running, settles them and forms batches. Two ways to produce: freely,
as admission allows (asynchronous), or batch after batch at the exact version `max(0, n - eta)`
(deterministic). Everything that must survive a kill is in the experience log.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import Issue, ShipEntry
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.rollout.groups import Groups, StreamError, is_known
from agentcpm_jax.rollout.staleness import Admission, choose, oldest_trained
from agentcpm_jax.types import Credit, Decision, Task, Trajectory, TrajectoryGroup

#: Samples with a verdict that a group needs: the baseline of a lone one says nothing.
MIN_VALID = 2
#: How often a task whose group had too few is issued again: a second failure is the task's own.
REISSUES = 1
#: Batches' worth of groups dropped in a row that stop the run: it would never train.
BARREN_BATCHES = 50
#: The same when the rewards themselves show why, at least `SURE_GROUPS` groups.
SURE_BATCHES, SURE_GROUPS = 5, 16
TOO_FEW = "too_few_valid"
EQUAL = "zero_variance"  # the filter's name
OVER_AGE = "over_age"


class NoSignal(StreamError):
    """Too many groups in a row were dropped: there is nothing to learn from."""


@dataclass(frozen=True)
class GroupOutcome:
    """The result of filters and credit assignment for a group.

    credits: (sample, segment) -> credit; segments without one are not shipped. `reason` says why
    a group is not kept, e.g. "zero_variance".
    """

    keep: bool
    reason: str = ""
    credits: Mapping[tuple[int, int], Credit] = field(default_factory=dict)
    decisions: Sequence[Decision] = ()


class Producer:
    """One run of a stage's rollouts; see `Stream`. Call all methods in one event loop."""

    def __init__(
        self,
        log: ExperienceLog,
        stage: str,
        tasks: Callable[[int], Task],
        groups: Groups,
        finish: Callable[[TrajectoryGroup], GroupOutcome],
        cfg: StreamConfig,
        use_version: Callable[[int], Awaitable[None]] | None,
    ) -> None:
        self._log, self._stage, self._cfg = log, stage, cfg
        self._tasks, self._finish, self._use_version = tasks, finish, use_version
        self.admission = Admission(cfg.batch_groups, cfg.max_staleness, cfg.max_concurrent_groups)
        self.groups = groups
        self.stats = StreamStats()
        self.error: BaseException | None = None
        self.running: dict[int, RunningGroup] = {}
        self.ready: dict[int, ReadyGroup] = {}
        self._waiting: deque[Issue] = deque()  # in flight when the last run ended
        self._failures: Counter[int] = Counter()  # ordinal -> drops as TOO_FEW
        self._again: set[int] = set()  # ordinals of failed tasks to issue again
        self._next_ordinal = 0
        self._step = 0  # the next step to ship
        self._wanted: tuple[int, concurrent.futures.Future[None]] | None = None
        self._dropped = DroppedRewards()  # since the last batch was shipped
        self._waiters: list[asyncio.Future[None]] = []
        self._group_tasks: set[asyncio.Task[ReadyGroup | None]] = set()
        self._main_task: asyncio.Task[None] | None = None

    async def run(self, version: int, begun: Callable[[], None]) -> None:
        """Recovers, calls `begun`, then produces until `cancel` or a failure (`error`)."""
        self._main_task = asyncio.current_task()
        try:
            self._recover(version)
            begun()
            await (self._produce_lockstep() if self._cfg.deterministic else self._produce())
        except asyncio.CancelledError:
            pass  # `cancel` or `_fail`
        except Exception as err:
            self.error = self.error or err
            raise
        finally:
            self.groups.stopping = True
            tasks = list(self._group_tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def cancel(self) -> None:
        """Ends `run`; running episodes are cancelled and stay resumable in the log."""
        self.groups.stopping = True
        if self._main_task is not None and not self._main_task.cancelling():
            self._main_task.cancel()

    def set_version(self, version: int) -> None:
        """Tells admission that `version` batches are completed."""
        self.admission.version = version
        self._wake()

    def want(self, step: int, future: concurrent.futures.Future[None]) -> None:
        """Resolves `future` once batch `step` is in the log, or fails it."""
        if self.groups.stopping:
            future.set_exception(self.error or StreamError("the stream was stopped"))
            return
        self._wanted = (step, future)
        self._wake()

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        if self._wanted is not None:
            self._wanted[1].set_exception(self.error)
            self._wanted = None
        self.cancel()

    def _recover(self, version: int) -> None:
        """Rebuilds counts, ready groups and in-flight work from the log."""
        log, stage, cfg = self._log, self._stage, self._cfg
        self._step = log.last_shipped_step(stage) + 1
        self._next_ordinal = log.next_ordinal(stage)
        for ordinal, (dropped, issued) in log.drop_counts(stage, "train", TOO_FEW).items():
            self._failures[ordinal] = dropped
            if dropped == issued and dropped <= REISSUES:
                self._again.add(ordinal)
        for issue in log.issues(stage, states=["issued", "ready"]):
            if cfg.deterministic and issue.batch is None:
                log.drop(issue.issue_id, "issued_asynchronously")
            elif issue.state == "issued":
                self._waiting.append(issue)
            else:
                group = log.load_group(issue.issue_id)
                ready = ReadyGroup(issue, group, self._finish(group))
                if ready.oldest:
                    self.ready[issue.issue_id] = ready
                else:
                    log.drop(issue.issue_id, "refiltered")
        shipped = len(log.issues(stage, states=["shipped"]))
        self.admission.recover(version, accepted=shipped + len(self.ready))

    def _wake(self) -> None:
        """After a change: ship the wanted batch if it is complete, then wake the producer."""
        if self._wanted is not None and not self.groups.stopping:
            try:
                self._try_ship(*self._wanted)
            except Exception as err:
                self._fail(err)
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    # ---- producing

    async def _produce(self) -> None:
        while True:
            await self._until(lambda: self.admission.get_capacity() > 0)
            if self._waiting:
                self._launch(self._waiting.popleft(), resumed=True)
            else:
                self._launch(self._issue(1)[0])

    async def _produce_lockstep(self) -> None:
        assert self._use_version is not None
        batch = self._step
        while True:
            version = max(0, batch - self._cfg.max_staleness)
            await self._until(lambda v=version: self.admission.version >= v)
            # An earlier run may have left issues of this batch, and of the next one too if the
            # trainer had not yet asked for this one when it was complete.
            resumed = [issue for issue in self._waiting if issue.batch == batch]
            self._waiting = deque(issue for issue in self._waiting if issue.batch != batch)
            while todo := resumed or self._issue(self._missing(batch), batch):
                await self._use_version(version)
                for issue in todo:
                    limit = self._cfg.max_concurrent_groups
                    await self._until(lambda n=limit: len(self.running) < n)
                    self._launch(issue, resumed=bool(resumed))
                await self._until(lambda: not self.running)
                resumed = []
            batch += 1

    def _missing(self, batch: int) -> int:
        """Number of groups a batch lacks. Rounds are issued whole: a restart repeats the ids."""
        if batch < self._step:  # it was shipped as soon as it was complete
            return 0
        return self._cfg.batch_groups - len(self._of_batch(batch))

    def _of_batch(self, batch: int) -> dict[int, ReadyGroup]:
        return {i: r for i, r in self.ready.items() if r.issue.batch == batch}

    def _issue(self, count: int, batch: int | None = None) -> list[Issue]:
        ordinals = [self._pick_ordinal() for _ in range(count)]
        rows = [(self._tasks(n), 0, n) for n in ordinals]
        ids = self._log.issue_round(self._stage, "train", rows, batch) if rows else []
        return [
            Issue(i, self._stage, "train", task, epoch, n, batch, "issued")
            for i, (task, epoch, n) in zip(ids, rows, strict=True)
        ]

    def _pick_ordinal(self) -> int:
        """The next fresh task, or a failed one when a batch's worth has been issued since."""
        if self._again:
            n = min(self._again)
            if self._next_ordinal >= n + self._cfg.batch_groups:
                self._again.discard(n)
                return n
        self._next_ordinal += 1
        return self._next_ordinal - 1

    # ---- one group

    def _launch(self, issue: Issue, resumed: bool = False) -> None:
        """Start a group in a slot; `_returned` frees it in any case, cancellation included."""
        finished = self._reusable(issue) if resumed else {}
        self.admission.submit()
        start = min([self.admission.version, *(t.versions[0] for t in finished.values())])
        now = self.groups.progress = time.monotonic()
        self.running[issue.issue_id] = RunningGroup(start, now)
        task = asyncio.get_running_loop().create_task(self._group(issue, finished))
        self._group_tasks.add(task)
        task.add_done_callback(partial(self._returned, issue.issue_id))

    def _returned(self, issue_id: int, task: asyncio.Task[ReadyGroup | None]) -> None:
        self._group_tasks.discard(task)
        since = self.running.pop(issue_id).since
        failure = None if task.cancelled() else task.exception()
        ready = None if task.cancelled() or failure else task.result()
        if ready is None:
            self.admission.reject()
        else:
            self.admission.accept()
            self.ready[issue_id] = ready
        if failure is not None:
            self._fail(failure)
        elif not task.cancelled():
            self.stats.latencies.append(time.monotonic() - since)
        self._wake()

    def _reusable(self, issue: Issue) -> dict[int, Trajectory]:
        """Samples that an earlier run finished and that are recent enough to be trained."""
        limit = max(0, self.admission.version - self._cfg.max_staleness)
        return {
            t.sample: t
            for t in self._log.load_group(issue.issue_id).trajectories
            if is_known(t)
            and t.sample < self._cfg.group_size
            and (self._cfg.deterministic or t.versions[0] >= limit)
        }

    async def _group(self, issue: Issue, finished: dict[int, Trajectory]) -> ReadyGroup | None:
        """Run and settle one group; returns None when it is dropped."""
        group = await self.groups.group(issue, finished)
        if sum(map(is_known, group.trajectories)) < min(MIN_VALID, self._cfg.group_size):
            outcome = GroupOutcome(False, TOO_FEW)
        else:
            outcome = self._finish(group)
        ready = ReadyGroup(issue, group, outcome)
        keep = bool(ready.oldest)
        reason = "" if keep else outcome.reason or "nothing_trained"
        state = "ready" if keep else "dropped"
        self._log.finish_group(issue.issue_id, state, reason, outcome.decisions)
        self.stats.lengths.append((ready.num_tokens, not keep))
        if keep:
            return ready
        if reason == TOO_FEW:
            self._failures[issue.ordinal] += 1
            if self._failures[issue.ordinal] <= REISSUES:
                self._again.add(issue.ordinal)
        self._count_drop(reason, group)
        return None

    def _count_drop(self, reason: str, group: TrajectoryGroup) -> None:
        self.stats.dropped[reason] += 1
        self._dropped.add(reason, group)
        groups, batch = self._dropped.groups, self._cfg.batch_groups
        cause = self._no_verdicts() or self._dropped.cause()
        sure = max(SURE_GROUPS, SURE_BATCHES * batch) if cause else math.inf
        if groups >= min(sure, BARREN_BATCHES * batch):
            asked = "are the tasks too easy or too hard, or eta too small? (stream.max_staleness)"
            raise NoSignal(
                f"{groups} groups were dropped since the last batch; all drops: "
                f"{dict(self.stats.dropped)}; {cause or asked}"
            )

    def _no_verdicts(self) -> str:
        """That the dropped groups lost most of their attempts; empty when they did not."""
        unknown = self.groups.unknown
        lost = unknown.total() - self._dropped.unknown_before
        if 2 * lost <= self._dropped.groups * self._cfg.group_size:
            return ""
        return f"{lost} attempts ended without a verdict; of all: {dict(unknown)}"

    # ---- shipping

    def _try_ship(self, step: int, future: concurrent.futures.Future[None]) -> None:
        """Resolve `future` if batch `step` can be shipped or already was."""
        if step > self._step:
            self._wanted = None
            future.set_exception(ValueError(f"step {step} was asked for, {self._step} is next"))
            return
        if step < self._step or self._ship(step):  # shipped before, to a caller that went away
            self._wanted = None
            future.set_result(None)

    def _ship(self, step: int) -> bool:
        cfg = self._cfg
        limit = step - cfg.max_staleness
        pool = self._of_batch(step) if cfg.deterministic else self.ready
        choice = choose(
            {i: r.oldest for i, r in pool.items()},
            [] if cfg.deterministic else [g.start for g in self.running.values()],
            step,
            cfg.batch_groups,
            cfg.max_staleness,
            wait=cfg.over_age == "wait",
        )
        if choice.over_age and cfg.deterministic:
            raise StreamError(
                f"issue {choice.over_age[0]} holds tokens older than version {limit}: did "
                "`use_version` load the version it was given?"
            )
        for issue_id in choice.over_age:
            self._log.drop(issue_id, OVER_AGE)
            self.admission.drop()
            old = self.ready.pop(issue_id)
            self.stats.lengths.append((old.num_tokens, True))
            self._count_drop(OVER_AGE, old.group)
        if not choice.ship:
            return False
        entries, decisions = [], []
        for issue_id in choice.ship:
            kept, left = self.ready[issue_id].split(limit)
            entries += kept
            decisions += [(issue_id, decision) for decision in left]
        self._log.ship(self._stage, step, entries, decisions)
        for issue_id in choice.ship:
            ready = self.ready.pop(issue_id)
            self.stats.ages.append(step - min(v for v in ready.oldest if v >= limit))
        self.stats.shipped_groups += len(choice.ship)
        self.stats.over_age_segments += len(decisions)
        self._step = step + 1
        self._dropped = DroppedRewards(self.groups.unknown.total())
        return True


@dataclass(frozen=True)
class RunningGroup:
    """`start`: lower bound of its oldest version; `since`: its start in monotonic seconds."""

    start: int
    since: float


@dataclass(frozen=True)
class ReadyGroup:
    """A finished, kept group that waits for its batch."""

    issue: Issue
    group: TrajectoryGroup
    outcome: GroupOutcome

    @cached_property
    def versions(self) -> dict[tuple[int, int], int | None]:
        """(sample, segment) -> oldest trained version of each credited segment; None: no token."""
        found: dict[tuple[int, int], int | None] = {}
        by_sample = {t.sample: t for t in self.group.trajectories}
        for (sample, index), credit in sorted(self.outcome.credits.items()):
            segment = by_sample[sample].segments[index]
            if not len(segment) == len(credit.keep) == len(credit.advantage):
                raise ValueError(
                    f"issue {self.issue.issue_id} sample {sample} segment {index}: "
                    f"{len(segment)} tokens, {len(credit.keep)} credits"
                )
            found[sample, index] = oldest_trained(segment, credit.keep)
        return found

    @property
    def oldest(self) -> list[int]:
        """The oldest trained version of each segment that trains anything."""
        if not self.outcome.keep:
            return []
        return [v for v in self.versions.values() if v is not None]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole group, shared prefixes of a trajectory counted once."""
        return sum(t.num_tokens for t in self.group.trajectories)

    def split(self, limit: int) -> tuple[list[ShipEntry], list[Decision]]:
        """Entries of the segments not older than version `limit`, a decision for each older."""
        entries, decisions = [], []
        for (sample, index), version in self.versions.items():
            if version is None or version >= limit:
                credit = self.outcome.credits[sample, index]
                entries.append(ShipEntry(self.issue.issue_id, sample, index, credit))
            else:
                why = f"segment {index}: version {version}, {limit} is the oldest allowed"
                decisions.append(Decision(sample, "over_age", why))
        return entries, decisions


@dataclass
class DroppedRewards:
    """The rewards of groups that were dropped, to tell a scale from tasks that are too hard."""

    unknown_before: int = 0  # attempts without a verdict before the first of them
    groups: int = 0
    others: int = 0  # groups that were dropped for anything but equal rewards
    least: float = math.inf
    most: float = -math.inf
    spread: float = 0.0  # the largest difference within a group

    def add(self, reason: str, group: TrajectoryGroup) -> None:
        """Counts one more."""
        rewards = [t.reward for t in group.trajectories if is_known(t) and t.reward is not None]
        self.groups += 1
        self.others += reason != EQUAL or not rewards
        if rewards:
            low, high = min(rewards), max(rewards)
            self.least, self.most = min(self.least, low), max(self.most, high)
            self.spread = max(self.spread, high - low)

    def cause(self) -> str:
        """What is wrong with the rewards themselves; empty when nothing certainly is."""
        if self.others:
            return ""
        span = f"rewards from {self.least:g} to {self.most:g}"
        if self.spread > 0:
            return (
                f"{span}, within a group at most {self.spread:g} apart: scale the grader's rewards "
                "to 0 (wrong) and 1 (right), or lower denoise.min_spread"
            )
        if self.least == self.most and self.most not in (0, 1):
            return f"every reward was {self.most:g}: does the grader tell right from wrong?"
        return ""


@dataclass
class StreamStats:
    """Figures of this run, in memory; the log holds the permanent ones."""

    dropped: Counter[str] = field(default_factory=Counter)
    shipped_groups: int = 0
    over_age_segments: int = 0
    ages: deque[int] = field(default_factory=lambda: deque(maxlen=4096))  # of shipped groups
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=1024))  # s, of groups
    lengths: deque[tuple[int, bool]] = field(default_factory=lambda: deque(maxlen=4096))

    def figures(self) -> dict[str, float]:
        """Flat figures; `dropped_decile/k`: drop rate of the k-th tenth of groups by length."""
        found: dict[str, float] = {
            "shipped_groups": self.shipped_groups,
            "over_age_segments": self.over_age_segments,
        }
        found |= {f"dropped/{reason}": n for reason, n in list(self.dropped.items())}
        if ages := list(self.ages):
            found |= {"age_mean": float(np.mean(ages)), "age_max": max(ages)}
        if seconds := list(self.latencies):
            found["group_seconds_mean"] = float(np.mean(seconds))
            found["group_seconds_p95"] = float(np.quantile(seconds, 0.95))
        if len(lengths := sorted(self.lengths)) >= 10:
            for k, tenth in enumerate(np.array_split([dropped for _, dropped in lengths], 10)):
                found[f"dropped_decile/{k}"] = float(tenth.mean())
        return found
