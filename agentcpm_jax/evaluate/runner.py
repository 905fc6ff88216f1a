"""Runs held-out tasks through the agent loop, durably: what has a verdict is never run again."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from agentcpm_jax.evaluate.outage import ATTEMPTS, Outages
from agentcpm_jax.evaluate.passk import TaskScore
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import Issue, Result
from agentcpm_jax.types import UNKNOWN_STOPS, StopReason, Task, Trajectory, UserError, Verdict

#: (task, issue_id, sample, attempt) -> a graded trajectory
RunSample = Callable[[Task, int, int, int], Awaitable[Trajectory]]
#: Seconds that one attempt may take: a tool that hangs must not hold its place for ever.
DEADLINE = 3600.0


async def evaluate(
    tasks: Sequence[Task],
    run_sample: RunSample,
    log: ExperienceLog,
    stage: str,
    *,
    samples: int,
    concurrency: int,
    on_task: Callable[[], None] = lambda: None,
    announce: Callable[[str], None] = lambda line: None,
) -> list[TaskScore]:
    """Score each different task by `samples` graded episodes, at most `concurrency` at a time.

    They are written to the log as kind 'eval' of `stage` and found there by their task's uid, so
    that the tasks may come in another order, and be fewer or more. A sample that failed outside the
    policy is asked again, here until the outage is over and by the next call; it is never wrong.

    Raises:
      BreakerOpen: nothing has a verdict any more; the next call asks what is missing.
      UserError: of `run_sample`.
    """
    different: dict[str, Task] = {}
    for task in tasks:
        different.setdefault(task.uid, task)
    issues, known = log.issues(stage, "eval"), _known(log, stage)
    if line := _resumed(different, samples, issues, known):
        announce(f"{stage}: {line}")
    unfinished = {issue.task.uid: issue for issue in issues if issue.state == "issued"}
    outages = Outages(stage, concurrency, announce)
    for (uid, sample), result in known.items():
        if uid in different:
            again = partial(_attempt, run_sample, different[uid], result.issue.issue_id, sample)
            outages.remember(again, _failure, result.attempt)

    async def one(task: Task, issue_id: int, sample: int) -> bool:
        once = partial(_attempt, run_sample, task, issue_id, sample)
        trajectory = await outages.ask(once, _failure)
        log.record_trajectory(trajectory)
        return not _failure(trajectory)

    async def whole(ordinal: int, task: Task) -> None:
        missing = [s for s in range(samples) if (task.uid, s) not in known]
        issue = unfinished.get(task.uid)
        issue_id = issue.issue_id if issue else -1
        if missing and issue is None:
            issue_id = log.issue(stage, "eval", task, 0, ordinal)
        async with asyncio.TaskGroup() as several:
            asked = [several.create_task(one(task, issue_id, s)) for s in missing]
        if issue_id >= 0 and all(one_of.result() for one_of in asked):
            log.finish_group(issue_id, "done")
        on_task()

    try:
        async with asyncio.TaskGroup() as several:
            for ordinal, task in enumerate(different.values()):
                several.create_task(whole(ordinal, task))
    except BaseExceptionGroup as failed:
        raise _first(failed) from None
    return task_scores(list(different.values()), log, stage, samples)


def task_scores(
    tasks: Sequence[Task], log: ExperienceLog, stage: str, samples: int
) -> list[TaskScore]:
    """The scores recorded for a stage's tasks, `samples` of each asked, in the order of `tasks`."""
    verdicts: defaultdict[str, list[Verdict]] = defaultdict(list)
    for (uid, sample), result in _known(log, stage).items():
        if sample < samples:
            verdicts[uid].append(result.verdict)
    return [_score(task, verdicts[task.uid], samples) for task in tasks]


def _score(task: Task, verdicts: Sequence[Verdict], samples: int) -> TaskScore:
    graded = len(verdicts) - verdicts.count(Verdict.UNKNOWN)
    right, lost = verdicts.count(Verdict.RIGHT), samples - len(verdicts)
    return TaskScore(task.uid, graded, right, task.kind, samples - graded, lost)


def _known(log: ExperienceLog, stage: str) -> dict[tuple[str, int], Result]:
    """(uid, sample) -> the newest result that is not to be asked again."""
    found = log.results(stage)
    return {(r.issue.task.uid, r.sample): r for r in found if r.stop not in UNKNOWN_STOPS}


def _resumed(
    tasks: Mapping[str, Task],
    samples: int,
    issues: Sequence[Issue],
    known: Mapping[tuple[str, int], Result],
) -> str:
    """What an earlier call left: a line, or nothing."""
    if not issues:
        return ""
    whole = {uid for uid in tasks if all((uid, s) in known for s in range(samples))}
    recorded = {issue.task.uid for issue in issues}
    lost = {issue.task.uid for issue in issues if issue.state == "done"} & tasks.keys() - whole
    parts = [f"{len(whole)} of {len(tasks)} tasks have their results"]
    parts += [f"{len(lost)} that ended without are asked again"] if lost else []
    left = len(recorded - tasks.keys())
    return ", ".join(parts + ([f"{left} of other tasks are left out"] if left else []))


async def _attempt(
    run_sample: RunSample, task: Task, issue_id: int, sample: int, attempt: int
) -> Trajectory:
    """One attempt, whatever becomes of it; one whose judge abstains is made a few times at once."""
    trajectory = Trajectory((), (), StopReason.INFRA_ERROR)
    limit = asyncio.timeout(DEADLINE)
    try:
        async with limit:
            for _ in range(ATTEMPTS):
                trajectory = await run_sample(task, issue_id, sample, attempt)
                if trajectory.verdict != Verdict.UNKNOWN or _failure(trajectory):
                    break
    except UserError:
        raise
    except asyncio.CancelledError:
        current = asyncio.current_task()
        if current is not None and current.cancelling():
            raise
        error = "cancelled from within"
        trajectory = Trajectory((), (), StopReason.CANCELLED, error=error)
    except Exception as failed:
        why = f"{type(failed).__name__}: {failed}"
        error = f"no result within {DEADLINE:g} s" if limit.expired() else why
        trajectory = Trajectory((), (), StopReason.INFRA_ERROR, error=error)
    return replace(trajectory, issue_id=issue_id, sample=sample, attempt=attempt)


def _failure(trajectory: Trajectory) -> str:
    """What outside the policy ended the sample; "" for nothing."""
    if trajectory.stop not in UNKNOWN_STOPS:
        return ""
    return f"{trajectory.stop}: {trajectory.error or 'no message'}"


def _first(failed: BaseException) -> BaseException:
    while isinstance(failed, BaseExceptionGroup):
        failed = failed.exceptions[0]
    return failed
