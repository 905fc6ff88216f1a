"""A small finished RL run without rollouts: the log holds its batches before it starts.

The real loop then trains what is recorded, as it does after a kill. A random model of one layer;
texts that try to break a page; a fork, an over-age segment, a dropped and an unfinished issue.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from agentcpm_jax.chat.format import ChatFormat
from agentcpm_jax.checkpoint import Checkpointer
from agentcpm_jax.config import ExperimentConfig, RLStage, Stage, TrainShape
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.log.schema import ShipEntry
from agentcpm_jax.model.config import TINY
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rewards.grade import settle
from agentcpm_jax.rollout.config import EpisodeConfig, StreamConfig
from agentcpm_jax.rollout.stream import GroupOutcome
from agentcpm_jax.run.context import open_context
from agentcpm_jax.run.loop import train
from agentcpm_jax.run.observe.metrics import silent
from agentcpm_jax.run.sampling import make_finish
from agentcpm_jax.run.start.signals import StopSignal
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.types import (
    Decision,
    Provenance,
    Segment,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    TrajectoryGroup,
    Turn,
    TurnFlag,
    Verdict,
)

STEPS = 4
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e\"'&amp;"
CFG = ExperimentConfig(
    episode=EpisodeConfig(max_context=512),
    name="recorded <b>run</b>",
    model=replace(
        TINY,
        vocab_size=576,
        width=32,
        num_layers=1,
        ffw=48,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
    ),
    stages=(
        Stage(
            "rl",
            RLStage(
                shape=TrainShape(row_length=320, rows=4, steps=STEPS, checkpoint_every=2),
                optimizer=OptimizerConfig(lr=1e-2, schedule="constant", weight_decay=0.0),
                denoise=DenoiseConfig(
                    ("environment", "format", "long_turn"), max_turn_tokens=10**6
                ),
                advantages=AdvantageConfig(sign_clamp=False),
                stream=StreamConfig(batch_groups=1, group_size=4, max_staleness=0),
                engine=EngineConfig(slots=4, capacity=512),
            ),
        ),
    ),
)


def record_run(workdir: Path) -> None:
    """Fills the log of a new run and trains it; issue 1 is trained in step 1."""
    rl = CFG.stages[0].rl
    assert rl is not None
    with StopSignal() as stop:
        ctx = open_context(CFG, workdir, silent, stop)
        rng = np.random.default_rng(0)
        with ctx.log as log:
            # One batch more than steps: the stream has nothing to sample before the run ends.
            for batch in range(STEPS + 1):
                _ship(log, ctx.chat, rl, rng, batch)
            _drop(log, ctx.chat, rng)
            _ready(log, ctx.chat, rl, rng, 60)
            log.issue("rl", "train", task(99), 0, 99)
            train(ctx, CFG.stages[0])


@functools.cache
def finished() -> Path:
    """One such run for all tests of this process that only look; copy it to change it."""
    directory = tempfile.mkdtemp(prefix="recorded-run-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    workdir = Path(directory) / "run"
    record_run(workdir)
    return workdir


def checkpoints(workdir: Path) -> Checkpointer:
    """Those of the stage."""
    return Checkpointer(workdir / "rl" / "checkpoints")


def task(number: int) -> Task:
    return Task(f"Who wrote {EVIL} number {number}?", (EVIL, "nobody"), kind="hop1")


def _ship(
    log: ExperienceLog, chat: ChatFormat, rl: RLStage, rng: np.random.Generator, batch: int
) -> None:
    issue_id, outcome = _ready(log, chat, rl, rng, batch)
    entries = [
        ShipEntry(issue_id, sample, segment, credit)
        for (sample, segment), credit in outcome.credits.items()
        if (sample, segment) != (3, 1)
    ]
    late = Decision(3, "over_age", "segment 1: version 0, 1 is the oldest allowed")
    log.ship("rl", batch, entries, [(issue_id, late)])


def _ready(
    log: ExperienceLog, chat: ChatFormat, rl: RLStage, rng: np.random.Generator, number: int
) -> tuple[int, GroupOutcome]:
    """A group of four, sampled at the version before that of batch `number`."""
    issue_id = log.issue("rl", "train", task(number), 0, number)
    version = max(0, min(number, STEPS) - 1)
    samples = [_trajectory(chat, rng, issue_id, s, version) for s in range(4)]
    for trajectory in samples:
        log.record_trajectory(trajectory)
    finish = make_finish(rl.denoise, rl.credit)
    outcome = finish(TrajectoryGroup(issue_id, task(number), tuple(samples)))
    assert outcome.keep
    log.finish_group(issue_id, "ready", decisions=outcome.decisions)
    return issue_id, outcome


def _drop(log: ExperienceLog, chat: ChatFormat, rng: np.random.Generator) -> None:
    issue_id = log.issue("rl", "train", task(50), 0, 50)
    for sample in range(2):
        log.record_trajectory(_trajectory(chat, rng, issue_id, sample, 0))
    log.finish_group(issue_id, "dropped", "over_age")


def _trajectory(
    chat: ChatFormat, rng: np.random.Generator, issue_id: int, sample: int, version: int
) -> Trajectory:
    """Two turns with a call and its result between them; sample 3 forks before its second turn."""
    prompt = chat.encode_text(f"question {issue_id} {EVIL}\n")
    call = chat.encode_text(f'{{"name": "search", "q": "{EVIL}"}}' + "x" * sample)
    seen = chat.encode_text(f"result {EVIL}\n")
    reply = rng.integers(300, 500, 6 + 4 * sample).astype(np.int32)
    first = [
        (prompt, Provenance.TEMPLATE),
        (call, Provenance.SAMPLED),
        (seen, Provenance.TOOL),
    ]
    shown = len(prompt) + len(call) + len(seen)
    forked = sample == 3
    if forked:
        again = np.concatenate([prompt, call])
        segments = (
            _segment(first, version, rng),
            _segment(
                [(again, Provenance.HISTORY), (reply, Provenance.SAMPLED)],
                version,
                rng,
                parent_segment=0,
                shared_prefix_len=len(again),
                edit_reason=f"dropped {EVIL}",
            ),
        )
        second = Turn(1, len(again), len(again), len(again) + len(reply))
    else:
        segments = (_segment([*first, (reply, Provenance.SAMPLED)], version, rng),)
        second = Turn(0, len(prompt) + len(call), shown, shown + len(reply))
    malformed = ToolCall(EVIL, None, "bad_json", EVIL, (len(prompt) + 2, len(prompt) + 5))
    asked = ToolCall("search", {"q": EVIL, "<b>": 1})
    turns = (
        Turn(
            0,
            0,
            len(prompt),
            len(prompt) + len(call),
            (asked, malformed) if sample == 1 else (asked,),
            (ToolResult(ToolStatus.OK, f"result {EVIL}", 0.25),),
            (TurnFlag.FORMAT_ERROR,) if sample == 1 else (),
        ),
        second,
    )
    trajectory = Trajectory(
        segments, turns, StopReason.ANSWERED, issue_id, sample, answer=EVIL, seconds=1.5
    )
    return settle(trajectory, Verdict.RIGHT if sample % 2 else Verdict.WRONG)


def _segment(
    parts: list[tuple[np.ndarray, Provenance]],
    version: int,
    rng: np.random.Generator,
    **fork: object,
) -> Segment:
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int32)
    provenance = np.concatenate([np.full(len(ids), p, np.uint8) for ids, p in parts])
    sampled = provenance == Provenance.SAMPLED
    logprob = np.where(sampled, rng.uniform(-7.0, -5.5, len(ids)), np.nan).astype(np.float32)
    versions = np.where(sampled, version, -1).astype(np.int32)
    return Segment(ids, provenance, logprob, versions, **fork)  # type: ignore[arg-type]
