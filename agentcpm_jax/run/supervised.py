"""The two supervised stages: next-token pretraining of a tiny base, and SFT on demonstrations."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.config import PretrainPhase, SFTStage, Stage, TrainShape, to_json
from agentcpm_jax.data.batch import Batch
from agentcpm_jax.data.conversation import Conversation
from agentcpm_jax.data.examine import examine_conversations
from agentcpm_jax.data.loader import EpochBatches, StepBatches
from agentcpm_jax.data.rows import Row, text_row
from agentcpm_jax.data.schemas import read_conversation
from agentcpm_jax.data.sft import conversation_rows
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.learner import first_state, make_cut, plain
from agentcpm_jax.run.multihost import (
    Interrupted,
    any_process,
    decide,
    is_main,
    local_rows,
    on_devices,
)
from agentcpm_jax.run.observe.dataset import announce_data
from agentcpm_jax.run.observe.health import stop_if_not_finite
from agentcpm_jax.run.observe.machine import start_line
from agentcpm_jax.run.observe.metrics import MetricsWriter, NoMetrics
from agentcpm_jax.run.observe.profile import watched
from agentcpm_jax.sharding import batch_sharding
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.placement import step_shardings
from agentcpm_jax.train.step import Frozen, make_sft_step
from agentcpm_jax.types import UserError
from agentcpm_jax.world.questions import demonstration
from agentcpm_jax.world.search import search_index
from agentcpm_jax.world.skills import MIXES, document
from agentcpm_jax.world.tools import SCHEMAS, config_of

#: Loss weight of pretraining tokens that are not an answer: enough to learn what pages look like.
PROMPT_WEIGHT = 0.1
#: Shares of the demonstrations in which the teacher errs as a noisy one does: of the visits, those
#: that go to a look-alike page first; of the multi-hop answers, those that give the inner hop.
WRONG_PICK, STOP_EARLY = 0.1, 0.6


class Trained(NamedTuple):
    """The merged parameters of a finished stage, and the trained ones: the same, or adapters."""

    params: Any
    state: Any


def run_pretrain(ctx: RunContext, stage: Stage) -> None:
    """Train through the phases in order; a config.base that names a directory replaces them all."""
    directory = ctx.directory(stage)
    if ctx.cfg.base != "scratch":
        ctx.save_model(directory / "hf", ctx.load_params(ctx.cfg.base))
        return
    assert stage.pretrain is not None
    load: Callable[[Any], Any] = partial(ctx.load_params, stage.init_from)
    for number, phase in enumerate(stage.pretrain.phases):
        name = f"{stage.name} {number + 1}/{len(stage.pretrain.phases)}"
        dataset = StepBatches(
            pretrain_source(ctx.chat, phase, f"{ctx.cfg.seed}/{number}"),
            phase.shape.row_length,
            phase.shape.rows,
            on_rejected=lambda step, rejected: None,  # the next document of a full batch
        )
        place = directory / f"phase{number}"
        trained = _train(ctx, place, name, load, dataset, phase.shape, phase.optimizer)
        load = partial(_again, trained.params)
    ctx.save_model(directory / "hf", load(None))


def run_sft(ctx: RunContext, stage: Stage) -> None:
    """SFT on a JSONL of conversations, or on the offline world's demonstrations."""
    assert stage.sft is not None
    directory, sft = ctx.directory(stage), stage.sft
    rows, counts = sft_rows(ctx, sft, directory)
    dataset = EpochBatches(
        rows,
        sft.shape.row_length,
        sft.shape.rows,
        seed=ctx.cfg.seed,
        only=_own_rows(ctx, sft.shape),
    )
    counts["too_long"] += len(dataset.rejected)
    shape = sft.shape
    if sft.epochs:
        shape = replace(shape, steps=sft.epochs * dataset.steps_per_epoch)
    trained = _train(
        ctx,
        directory,
        stage.name,
        partial(ctx.load_params, stage.init_from),
        dataset,
        shape,
        sft.optimizer,
        {f"sft/rows_{reason}": n for reason, n in counts.items()},
    )
    ctx.save_model(directory / "hf", trained.params)
    if ctx.cfg.model.lora_rank:
        ctx.save_adapters(directory / "adapter", trained.state, stage.init_from)


def pretrain_source(
    chat: ChatFormat, phase: PretrainPhase, seed: str
) -> Callable[[int], Sequence[Row]]:
    """step -> rows: documents drawn for that step alone, a little more than fill the batch."""

    def rows(step: int) -> list[Row]:
        rng = random.Random(f"pretrain/{seed}/{step}")
        wanted, out = phase.shape.rows * phase.shape.row_length, []
        while wanted > 0:
            parts = [(chat.encode_text(t), a) for t, a in document(rng, MIXES[phase.mix]).parts]
            ids = np.concatenate([ids for ids, _ in parts])
            weights = np.concatenate(
                [np.full(len(i), 1.0 if a else PROMPT_WEIGHT, np.float32) for i, a in parts]
            )
            if len(ids) <= phase.shape.row_length:
                out.append(text_row(ids, weights))
                wanted -= len(ids)
        return out

    return rows


def sft_rows(ctx: RunContext, sft: SFTStage, directory: Path) -> tuple[list[Row], Counter[str]]:
    """(rows, counts of kept and dropped conversations), which are announced and recorded."""
    if sft.data.path:
        length = sft.shape.row_length
        rows, found = examine_conversations(sft.data.path, ctx.chat, sft.data, length)
        say = partial(announce_data, directory, found.usable(), ctx.announce, ctx.accept_data)
        decide(f"{directory.name}/data", say)
        return rows, found.counts
    conversations, right = world_demonstrations(ctx, sft)
    rows, counts = conversation_rows(conversations, ctx.chat, sft.data)
    counts["right"] += right
    return rows, counts


def world_demonstrations(ctx: RunContext, sft: SFTStage) -> tuple[list[Conversation], int]:
    """(conversations by an imperfect teacher on the training worlds, how many end right)."""
    conversations, right = [], 0
    system = [{"role": "system", "content": ctx.cfg.episode.system_prompt}]
    for task in ctx.cfg.train_tasks.take(sft.demonstrations.count):
        made = demonstration(
            task,
            search_index(config_of(task.meta)).world,
            rng=random.Random(f"demo/{ctx.cfg.seed}/{task.uid}"),
            wrong_pick=WRONG_PICK,
            stop_early=STOP_EARLY,
        )
        right += made.right
        messages = (system if ctx.cfg.episode.system_prompt else []) + made.messages
        record = {"messages": messages, "tools": list(SCHEMAS)}
        conversations.append(read_conversation(record, task.uid))
    return conversations, right


def _train(
    ctx: RunContext,
    directory: Path,
    name: str,
    load: Callable[[Any], Any],
    dataset: grain.IterDataset,
    shape: TrainShape,
    optimizer: OptimizerConfig,
    constants: dict[str, float] | None = None,
) -> Trained:
    """The supervised loop: resume, step, log, checkpoint."""
    tx, schedule = make_optimizer(optimizer, shape.steps)
    model = ctx.cfg.model
    shardings = step_shardings(ctx.mesh, model, tx, shape.micro_rows or shape.rows)
    state, base = first_state(load, tx, shardings, ctx.cfg)
    checkpoints = Checkpointer(directory / "checkpoints", keep=2)
    iterator = iter(dataset)
    restored = checkpoints.restore(abstract_state=state, loader=iterator)
    start = 0
    if restored is not None:
        state, start = restored.state, restored.step
    writer = MetricsWriter if is_main() else NoMetrics
    metrics = writer(directory / "metrics.jsonl", start)
    micro_rows = shape.micro_rows or 0
    step_fn = make_sft_step(model, tx, schedule, micro_rows=micro_rows, shardings=shardings)
    cut = make_cut(shape, ctx.mesh)
    ctx.announce(start_line(ctx, name, shape, start))
    bar = ctx.progress(name, shape.steps, start)
    unread: list[tuple[int, Batch, Any]] = []  # steps whose loss is not checked yet

    watching = watched(ctx, directory, start, shape.rows, shape.row_length)
    with closing(checkpoints), closing(bar), watching as on_phase:
        for step in range(start + 1, shape.steps + 1):
            on_phase(step, "reading the batch")
            batch: Batch = next(iterator)
            on_phase(step, "train step")
            placed = on_devices(cut(batch), shardings and shardings.batch, shape.rows)
            state, values = step_fn(state, placed, Frozen(base))
            if ctx.cfg.profile:
                jax.block_until_ready(values)  # times the step alone
            on_phase(step, "reading the loss")
            unread.append((step, batch, values["train/loss"]))
            stopping = any_process(ctx.stop.requested)
            saves = step % shape.checkpoint_every == 0 or step == shape.steps or stopping
            logs = step % shape.log_every == 0 or step == shape.steps
            if saves or logs:
                for at, read, loss in unread:
                    stop_if_not_finite({"train/loss": loss}, read, directory, name, at)
                unread.clear()
            if logs:
                values = jax.device_get(values)
                metrics.write(step, {**values, **(constants or {})})
                bar.set_postfix_str(f"loss {values['train/loss']:.3f}")
                _check_finite(values, name, step)
            bar.update(1)
            if saves:
                on_phase(step, "saving the checkpoint")
                _save(ctx, checkpoints, step, state, iterator)
            if stopping and step < shape.steps:
                raise Interrupted(f"stopped after step {step} of {name}; same command resumes")
    return Trained(plain(state.params, base, model), state.params)


def _save(ctx: RunContext, checkpoints: Checkpointer, step: int, state: Any, iterator: Any) -> None:
    """Starts writing the checkpoint; the workdir is this configuration's from here on."""
    ctx.claim()
    where = iterator.get_state()
    checkpoints.save(step, state=state, loader_state=where, config=to_json(ctx.cfg))


def _again(params: Any, shardings: Any) -> Any:
    """A `load` for parameters that are already on their devices."""
    return params


def _own_rows(ctx: RunContext, shape: TrainShape) -> Sequence[int] | None:
    """The rows of a batch that this process builds; None: all."""
    if jax.process_count() == 1:
        return None
    return local_rows(batch_sharding(ctx.mesh), (shape.rows, shape.row_length)).tolist()


def _check_finite(values: dict[str, Any], name: str, step: int) -> None:
    if values["train/nonfinite"] > 10:
        raise UserError(
            f"{name}: more than 10 updates were skipped for a non-finite gradient by step "
            f"{step}; look at the data, or lower the learning rate in another --workdir"
        )
