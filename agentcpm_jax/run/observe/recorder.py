"""Records a training step: a line of metrics, alerts, the progress bar."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import jax
import numpy as np

from agentcpm_jax.config import RLStage, Stage
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.pack import forward_fill
from agentcpm_jax.data.rows import shipped_stats
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.multihost import is_main
from agentcpm_jax.run.observe import machine
from agentcpm_jax.run.observe.alerts import Alerts
from agentcpm_jax.run.observe.health import is_lockstep, stop_if_not_finite
from agentcpm_jax.run.observe.metrics import MetricsWriter, NoMetrics
from agentcpm_jax.run.observe.outcomes import outcome_metrics
from agentcpm_jax.run.observe.staleness import age_metrics, drop_metrics, stale_drops
from agentcpm_jax.types import ShippedSegment


class Recorder:
    """Records an RL stage that continues after step `start`; only the first process writes."""

    def __init__(self, ctx: RunContext, stage: Stage, rl: RLStage, start: int) -> None:
        self._ctx, self._stage, self._rl = ctx, stage, rl
        writer = MetricsWriter if is_main() else NoMetrics
        self._metrics = writer(ctx.directory(stage) / "metrics.jsonl", start)
        self._alerts = Alerts(ctx.announce, self._metrics.kept, lockstep=is_lockstep(stage))
        self._bar = ctx.progress(stage.name, rl.shape.steps, start)

    def record(
        self,
        step: int,
        values: Mapping[str, Any],
        batch: Batch,
        shipped: Sequence[ShippedSegment],
        rollouts: Mapping[str, float],
        waited: float,
        seconds: float,
    ) -> None:
        """Metrics of one step: losses, rewards, staleness, filters, time.

        Args:
          values: what the step returned.
          batch, shipped: what it was trained on; `shipped` in the first process only.
          rollouts: `Sampler.metrics`: how the sampling goes on meanwhile.
          waited, seconds: time waited for the batch, and of the whole step with publishing.
        Raises:
          UserError: the loss is not finite, see `stop_if_not_finite`.
        """
        values = dict(jax.device_get(values))
        where = self._ctx.directory(self._stage), self._stage.name, step
        self._set_aside(step, values["train/loss"])
        stop_if_not_finite(values, batch, *where, (s.issue_id for s in shipped))
        if not is_main():
            return
        values |= rollouts
        values |= outcome_metrics(self._ctx.log, shipped)
        values |= age_metrics(shipped, step - 1) | shipped_stats(shipped).metrics()
        values |= drop_metrics(stale_drops(self._ctx.log, self._stage.name, steps=step))
        micro_rows = self._rl.shape.micro_rows or 0
        values |= {
            "data/fill": forward_fill(np.asarray(batch.segment_ids), micro_rows),
            "time/step_seconds": seconds,
            "time/waited_seconds": waited,
            "time/trainer_idle": waited / seconds,
        }
        self._alerts.observe(self._metrics.write(step, values))
        reward = values.get("reward/mean")
        shown = "" if reward is None else f"reward {reward:.2f}  "
        self._bar.set_postfix_str(f"{shown}age {values['stale/age_mean']:.1f}")
        self._bar.update(1)

    def _set_aside(self, step: int, loss: float) -> None:
        """Of a loss that is not finite: a resume takes another batch, unless later ones follow."""
        log, stage = self._ctx.log, self._stage.name
        if is_main() and not math.isfinite(loss) and log.last_shipped_step(stage) == step - 1:
            log.set_aside(stage, step - 1, f"the loss is {loss}")

    def close(self) -> None:
        """Leaves the progress bar as it is."""
        self._bar.close()


@contextmanager
def open_recorder(ctx: RunContext, stage: Stage, rl: RLStage, start: int) -> Iterator[Recorder]:
    """A recorder; removes the metrics of steps after `start` and records the machine."""
    if is_main():
        machine.record(ctx.directory(stage), start)
    ctx.announce(machine.start_line(ctx, stage.name, rl.shape, start))
    with closing(Recorder(ctx, stage, rl, start)) as recorder:
        yield recorder
