"""The RL loop on one page: sample, reward, advantage; then rows, step, publish, and again."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.config import RLStage, Stage, to_json
from agentcpm_jax.data.loader import StepIterator
from agentcpm_jax.data.rows import shipped_rows
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.custom import make_reward
from agentcpm_jax.run.learner import make_batches, make_learner
from agentcpm_jax.run.multihost import Interrupted, any_process, is_main, on_main, share_batch
from agentcpm_jax.run.observe.dataset import announce_tasks
from agentcpm_jax.run.observe.profile import watched
from agentcpm_jax.run.observe.recorder import open_recorder
from agentcpm_jax.run.sampler import NoSampler, Sampler, open_sampler
from agentcpm_jax.run.sampling import make_finish, task_sequence
from agentcpm_jax.train.step import TrainState


def train(ctx: RunContext, stage: Stage) -> None:
    """Asynchronous RL: the sampler works in its own threads while this one takes the steps.

    Version v = number of completed batches. Batch n is recorded in the experience log before step
    n runs, so a killed run recomputes its steps bit for bit. Of several processes the first one
    samples; the others take the same steps on the batches that it sends.
    `experiments/rl_minimal.py` is the same algorithm without concurrency.
    """
    rl = _section(stage)
    learner = make_learner(ctx, stage, rl)
    checkpoints = Checkpointer(ctx.directory(stage) / "checkpoints", keep=2)
    # batch n: its credited segments, as rows, packed
    batches = iter(make_batches(rl, lambda n: shipped_rows(sampler.segments(n))))
    state, start = _restored(ctx, checkpoints, learner.state, batches)
    params = on_main(learner.plain(state))
    with (
        open_recorder(ctx, stage, rl, start) as recorder,
        closing(checkpoints),
        _sampling(ctx, stage, rl, params, start) as sampler,
        watched(ctx, ctx.directory(stage), start, rl.shape.rows, rl.shape.row_length) as on_phase,
    ):
        for version in range(start, rl.shape.steps):
            step, started = version + 1, time.monotonic()
            on_phase(step, "waiting for the batch")
            batch = share_batch(f"{stage.name}/batch/{step}", lambda: next(batches))
            waited = time.monotonic() - started
            on_phase(step, "train step")
            state, values = learner.step(state, batch, jnp.int32(version))
            jax.block_until_ready(values)  # times the step alone; publishing needs it
            on_phase(step, "publishing the weights")
            sampler.publish(step, on_main(learner.plain(state)))
            seconds = time.monotonic() - started
            metrics = sampler.metrics()
            recorder.record(step, values, batch, sampler.last, metrics, waited, seconds)
            last, stopping = step == rl.shape.steps, any_process(ctx.stop.requested)
            if step % rl.shape.checkpoint_every == 0 or last or stopping:
                on_phase(step, "saving the checkpoint")
                _save(ctx, checkpoints, step, state, batches)
                if last or stopping:  # no later step overlaps with writing it
                    checkpoints.wait()
                sampler.forget(checkpoints.latest_step())
            if stopping and not last:
                raise Interrupted(
                    f"stopped after step {step} of {stage.name}; same command resumes"
                )
        ctx.save_model(ctx.directory(stage) / "hf", learner.plain(state))
        if ctx.cfg.model.lora_rank:
            ctx.save_adapters(ctx.directory(stage) / "adapter", state.params, stage.init_from)


def _sampling(
    ctx: RunContext, stage: Stage, rl: RLStage, params: Any, version: int
) -> AbstractContextManager[Sampler]:
    """Process 0 samples: tasks become trajectories with rewards, groups get advantages."""
    if not is_main():
        return nullcontext(NoSampler())
    announce_tasks(ctx, stage, rl)
    return open_sampler(
        ctx,
        stage,
        rl,
        params,
        version,
        tasks=task_sequence(rl, ctx.cfg.train_tasks, ctx.cfg.seed),
        reward=make_reward(rl.grader, rl.judge, ctx.workdir),
        advantage=make_finish(rl.denoise, rl.credit),
    )


def _restored(
    ctx: RunContext, checkpoints: Checkpointer, first: TrainState, batches: StepIterator
) -> tuple[TrainState, int]:
    """(state, completed steps) of the newest checkpoint, or `first` and 0; sets `batches` to it."""
    log = ctx.log if is_main() else None
    found = checkpoints.restore(abstract_state=first, loader=batches, log=log)
    return (first, 0) if found is None else (found.state, found.step)


def _save(
    ctx: RunContext, checkpoints: Checkpointer, step: int, state: TrainState, batches: StepIterator
) -> None:
    """Starts writing the checkpoint; returns after the previous one is on disk."""
    mine = is_main() or not ctx.cfg.log_url  # only process 0 has a shared log
    checkpoints.save(
        step,
        state=state,
        loader_state=batches.get_state(),
        config=to_json(ctx.cfg),
        log=ctx.log if mine else None,
    )


def _section(stage: Stage) -> RLStage:
    assert stage.rl is not None, "checked by config.from_config_dict"
    return stage.rl
