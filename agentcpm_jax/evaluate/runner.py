"""Runs held-out tasks through the agent loop, durably: finished tasks are never run again."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence

from agentcpm_jax.evaluate.passk import TaskScore
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.types import Task, Trajectory, Verdict

#: (task, issue_id, sample, attempt) -> a graded trajectory
RunSample = Callable[[Task, int, int, int], Awaitable[Trajectory]]
ATTEMPTS = 4  # at a sample, as long as its verdict is unknown


async def evaluate(
    tasks: Sequence[Task],
    run_sample: RunSample,
    log: ExperienceLog,
    stage: str,
    *,
    samples: int,
    concurrency: int,
    on_task: Callable[[], None] = lambda: None,
) -> list[TaskScore]:
    """Score every task by `samples` graded episodes, at most `concurrency` of them at a time.

    Tasks are written to the log as kind 'eval' of `stage` in their order; a task that is done
    there is not run again. A sample of unknown verdict is retried with the next attempt.
    """
    issued = {issue.ordinal: issue for issue in log.issues(stage, "eval")}
    slots = asyncio.Semaphore(concurrency)

    async def one(task: Task, issue_id: int, sample: int) -> None:
        async with slots:
            for attempt in range(ATTEMPTS):
                trajectory = await run_sample(task, issue_id, sample, attempt)
                if trajectory.verdict != Verdict.UNKNOWN or attempt == ATTEMPTS - 1:
                    log.record_trajectory(trajectory)
                    return

    async def whole(ordinal: int, task: Task) -> None:
        issue = issued.get(ordinal)
        if issue is None or issue.state != "done":
            issue_id = issue.issue_id if issue else log.issue(stage, "eval", task, 0, ordinal)
            await asyncio.gather(*(one(task, issue_id, s) for s in range(samples)))
            log.finish_group(issue_id, "done")
        on_task()

    await asyncio.gather(*(whole(i, task) for i, task in enumerate(tasks)))
    return task_scores(log, stage)


def task_scores(log: ExperienceLog, stage: str) -> list[TaskScore]:
    """The scores recorded for a stage, in task order."""
    tasks: dict[int, Task] = {}
    verdicts: defaultdict[int, list[Verdict]] = defaultdict(list)
    for result in log.results(stage):
        tasks[result.issue.ordinal] = result.issue.task
        verdicts[result.issue.ordinal].append(result.verdict)
    return [_score(tasks[ordinal], verdicts[ordinal]) for ordinal in sorted(tasks)]


def _score(task: Task, verdicts: Sequence[Verdict]) -> TaskScore:
    unknown = verdicts.count(Verdict.UNKNOWN)
    right = verdicts.count(Verdict.RIGHT)
    return TaskScore(task.uid, len(verdicts) - unknown, right, task.kind, unknown)
