"""The sampling half of an RL stage, in its own threads: tasks become credited trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from agentcpm_jax.config import RLStage, Stage
from agentcpm_jax.data.rows import shipped_rows
from agentcpm_jax.log.experience import SET_ASIDE, ExperienceLog
from agentcpm_jax.rewards.grade import Reward
from agentcpm_jax.rollout.episode import check_prompt
from agentcpm_jax.rollout.groups import ClaimedGroups, RunSample
from agentcpm_jax.rollout.policy import Engine
from agentcpm_jax.rollout.stream import GroupOutcome, Stream
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.custom import make_tools
from agentcpm_jax.run.engines import engine_metrics, open_engine
from agentcpm_jax.run.observe.meter import RolloutMeter
from agentcpm_jax.run.sampling import make_run_sample
from agentcpm_jax.run.worker import WorkerThread, make_worker
from agentcpm_jax.types import Decision, ShippedSegment, Task, Trajectory, TrajectoryGroup
from agentcpm_jax.weights.versions import VersionStore

#: The filter's name of what cannot be a row of a batch.
UNTRAINABLE = "untrainable"


@dataclass
class Sampler:
    """The stream of credited groups, the engine behind it and the weights that it samples with.

    Attributes:
      last: the segments of the last batch that was requested.
    """

    rl: RLStage
    log: ExperienceLog
    engine: Engine
    stream: Stream
    store: VersionStore
    meter: RolloutMeter
    last: list[ShippedSegment] = field(default_factory=list)

    def segments(self, batch: int) -> list[ShippedSegment]:
        """The ordered segments of batch 0, 1, ..., with their credit; blocks until the log holds
        them. A batch that is already in the log is returned as recorded, bit for bit.

        Raises `StreamError` when no more groups come.
        """
        self.last = self.stream.next_step_segments(batch)
        return self.last

    def publish(self, version: int, params: Any) -> None:
        """Hand new weights to the engine and the new version to admission."""
        self.store.put(version, params)
        if self.log.shared:
            self.log.announce("version")
        if not self.rl.stream.deterministic:  # else the stream asks for versions itself
            self.engine.set_params(params, version)
        self.stream.set_version(version)

    def forget(self, resumable: int | None) -> None:
        """Remove stored weights that a resume from step `resumable` cannot ask for."""
        if resumable is not None:
            self.store.collect_garbage(resumable - self.rl.stream.max_staleness)

    def metrics(self) -> dict[str, float]:
        """Metrics of the rollouts since the last call, and of the stream and the engine now."""
        return self.meter.drain() | self.stream.snapshot() | engine_metrics(self.engine)


class NoSampler(Sampler):
    """The sampler of all processes but the first, which makes the batches."""

    def __init__(self) -> None:
        self.last = []

    def segments(self, batch: int) -> list[ShippedSegment]:
        raise AssertionError("the first process makes the batches")

    def publish(self, version: int, params: Any) -> None: ...

    def forget(self, resumable: int | None) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {}


@contextmanager
def open_sampler(
    ctx: RunContext,
    stage: Stage,
    rl: RLStage,
    params: Any,
    version: int,
    *,
    tasks: Callable[[int], Task],
    reward: Reward,
    advantage: Callable[[TrajectoryGroup], GroupOutcome],
) -> Iterator[Sampler]:
    """Starts sampling with `params` as `version`; everything is stopped on every exit path.

    Args:
      tasks: ordinal -> task, endless.
      reward: of each trajectory.
      advantage: a complete group -> whether it is kept, and the credit of its tokens.
    Raises:
      UserError: the prompt does not fit the context; an engine that cannot be opened.
    """
    deterministic = rl.stream.deterministic
    open_tools, schemas = make_tools(ctx.cfg.tools)
    check_prompt(ctx.chat, ctx.cfg.episode, schemas)
    with ExitStack() as closing:  # closes in reverse order, all of them even if one fails
        engine = open_engine(ctx, stage, rl, params, version)
        closing.callback(engine.close)
        stored = deterministic or ctx.log.shared
        store = VersionStore(ctx.directory(stage), ctx.cfg.model, enabled=stored)
        store.put(version, params)

        async def use_version(wanted: int) -> None:
            engine.set_params(await store.wait(wanted), wanted)

        meter = RolloutMeter()
        sample = make_run_sample(
            meter.watching_policy(engine),
            ctx.chat,
            ctx.cfg.episode,
            open_tools,
            seed=ctx.cfg.seed,
            reward=reward,
            deadline=0.0 if deterministic else rl.judge.deadline,
        )
        groups = None
        if ctx.log.shared and not deterministic:  # others may claim, and so does this process
            groups = ClaimedGroups(ctx.log, stage.name, lambda: engine.version, meter.probe)
            worker = _worker(ctx, stage, rl, engine, sample, groups)
            closing.callback(worker.stop)
            worker.start()
        stream = Stream(
            ctx.log,
            stage.name,
            tasks,
            meter.watching(sample),
            partial(without_untrainable, advantage, rl.shape.row_length),
            rl.stream,
            use_version=use_version,
            groups=groups,
        )
        closing.callback(stream.stop)
        set_aside(ctx, stage, version, rl.shape.row_length)
        ctx.claim()  # the stream writes the log's first rows
        stream.start(version)
        yield Sampler(rl, ctx.log, engine, stream, store, meter)


def without_untrainable(
    finish: Callable[[TrajectoryGroup], GroupOutcome], row_length: int, group: TrajectoryGroup
) -> GroupOutcome:
    """What `finish` makes of a group, without the samples that could not be rows of a batch.

    They are decided about here, before a batch that holds them is recorded.
    """
    outcome = finish(group)
    bad = {
        t.sample: why
        for t in (group.trajectories if outcome.keep else ())
        if (why := untrainable(_segments(t, outcome), row_length))
    }
    if not bad:
        return outcome
    credits = {place: c for place, c in outcome.credits.items() if place[0] not in bad}
    said = [Decision(sample, UNTRAINABLE, why) for sample, why in bad.items()]
    return GroupOutcome(
        bool(credits), "" if credits else UNTRAINABLE, credits, [*outcome.decisions, *said]
    )


def untrainable(segments: Sequence[ShippedSegment], row_length: int) -> str:
    """Why these segments cannot be rows of at most `row_length` tokens; empty when they can."""
    try:
        longest = max(map(len, shipped_rows(segments)), default=0)
    except ValueError as error:
        return str(error)
    too_long = f"a row of {longest} tokens, shape.row_length is {row_length}"
    return too_long if longest > row_length else ""


def set_aside(ctx: RunContext, stage: Stage, version: int, row_length: int) -> None:
    """Takes recorded batches from `version` on back that cannot be trained, newest first."""
    while (step := ctx.log.last_shipped_step(stage.name)) >= version:
        why = untrainable(ctx.log.shipped(stage.name, step), row_length)
        if not why:
            return
        issues = ctx.log.set_aside(stage.name, step, why)
        ctx.announce(
            f"{stage.name}: the recorded batch of step {step + 1} cannot be trained ({why}); its "
            f"{len(issues)} groups are dropped as {SET_ASIDE}, others take their place"
        )


def _segments(trajectory: Trajectory, outcome: GroupOutcome) -> list[ShippedSegment]:
    issue, sample = trajectory.issue_id, trajectory.sample
    return [
        ShippedSegment(issue, sample, i, segment, outcome.credits[sample, i])
        for i, segment in enumerate(trajectory.segments)
        if (sample, i) in outcome.credits
    ]


def _worker(
    ctx: RunContext,
    stage: Stage,
    rl: RLStage,
    engine: Engine,
    sample: RunSample,
    groups: ClaimedGroups,
) -> WorkerThread:
    here = rl.workers.trainer_groups
    here = rl.stream.max_concurrent_groups if here is None else here
    return WorkerThread(make_worker(ctx, stage, rl, engine, here, sample), groups.fail)
