"""RL in the processes after the first: the same steps, on batches that come from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.config import RLStage, Stage, to_json
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.learner import Learner, make_learner
from agentcpm_jax.run.multihost import on_main
from agentcpm_jax.run.observe.health import stop_if_not_finite
from agentcpm_jax.train.step import TrainState


@dataclass
class Follower:
    """`loop.RLTrainer` for the other processes: what needs every one of them, and no more."""

    ctx: RunContext
    stage: str
    learner: Learner
    checkpoints: Checkpointer
    state: TrainState
    version: int
    batches: Iterator[Batch] = field(default_factory=lambda: iter(()))  # never asked here

    def publish(self, version: int) -> None:
        """Hands this process's part of the weights over."""
        on_main(self.learner.plain(self.state))

    def record(
        self, step: int, values: dict[str, Any], batch: Batch, waited: float, seconds: float
    ) -> None:
        """Stops where the first process stops."""
        stop_if_not_finite(values, batch, self.ctx.directory(self.stage), self.stage, step)

    def save(self, step: int) -> None:
        """Writes this process's part; returns when the step is on disk."""
        self.checkpoints.save(
            step,
            state=self.state,
            loader_state={},  # the first process's counts
            config=to_json(self.ctx.cfg),
            log=None if self.ctx.cfg.log_url else self.ctx.log,
        )
        self.checkpoints.wait()


@contextmanager
def follow(ctx: RunContext, stage: Stage, rl: RLStage) -> Iterator[Follower]:
    """Restores what the first process restores, and takes part in what that starts with."""
    learner = make_learner(ctx, stage, rl)
    checkpoints = Checkpointer(ctx.directory(stage) / "checkpoints", keep=2)
    restored = checkpoints.restore(abstract_state=learner.state)
    state = learner.state if restored is None else restored.state
    version = 0 if restored is None else restored.step
    on_main(learner.plain(state))
    with closing(checkpoints):
        yield Follower(ctx, stage.name, learner, checkpoints, state, version)
