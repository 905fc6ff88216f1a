"""The whole pipeline on a laptop CPU: base -> SFT -> merge -> asynchronous RL -> evaluation.

    make quickstart        or        python launch/train.py --config=configs/quickstart.py

Variants: `:smoke` runs every stage in about a minute and learns nothing; `--config.base=scratch`
trains the base in the run instead of using the shipped one.
"""

from typing import Any

from agentcpm_jax.config import (
    Demonstrations,
    EvalStage,
    PretrainPhase,
    TrainShape,
    default_config,
    stage_dict,
    to_config_dict,
)
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from configs.tiny import CONTEXT, TEST_ENGINE, use_tiny_world

ENGINE = EngineConfig(slots=96, capacity=CONTEXT, row_buckets=(24,), length_buckets=(192,))


def get_config(variant: str = ""):
    """`variant`: '' or 'smoke'."""
    c = recipe()
    if variant == "smoke":
        smoke(c)
    return c


def recipe() -> Any:
    """All five stages; about forty minutes on two cores."""
    c = default_config()
    c.name = "quickstart"
    c.workdir = "runs/quickstart"
    c.base = "shipped:base"
    use_tiny_world(c)
    c.stages = ("base", "sft", "merge", "rl", "eval")
    c.stage.base = stage_dict("pretrain", phases=pretrain_phases(1000, 500))
    c.stage.sft = stage_dict(
        "sft",
        "stage:base",
        demonstrations=Demonstrations(count=5000),
        shape=TrainShape(row_length=256, rows=8, steps=400),
        optimizer=OptimizerConfig(
            name="adamw",
            lr=2e-3,
            b2=0.95,
            eps=5e-7,
            weight_decay=0.0,
            schedule="cosine",
            warmup=20.0,
            final_fraction=0.05,
        ),
    )
    c.stage.merge = stage_dict(
        "merge",
        "stage:sft",
        alpha=(0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9),
        keep=0.93,
        validation=EvalStage(tasks=64, skill_tasks=100, engine=ENGINE),
        sweep=(0.5, 0.7, 0.9),
    )
    c.stage.rl = stage_dict(
        "rl",
        "stage:merge",
        # Some trajectories are short: rows longer than an episode leave less padding.
        shape=TrainShape(row_length=504, rows=32, micro_rows=1, steps=40, checkpoint_every=10),
        optimizer=OptimizerConfig(
            name="adamw",
            lr=6e-4,
            b2=0.95,
            eps=1e-5,
            weight_decay=0.0,
            schedule="constant",
            warmup=3.0,
        ),
        loss=LossConfig(name="minirl"),
        stream=StreamConfig(
            batch_groups=12, group_size=8, max_staleness=1, max_concurrent_groups=16
        ),
        engine=ENGINE,
    )
    c.stage.eval = stage_dict(
        "eval",
        models=("base", "sft", "merge", "rl"),
        tasks=400,
        samples=4,
        skill_tasks=200,
        engine=ENGINE,
    )
    return c


def pretrain_phases(easy: int, full: int) -> tuple[PretrainPhase, ...]:
    """So many steps on short rows and easy pages, then on longer pages: copying appears sooner
    that way."""

    def muon(lr: float, adam_lr: float) -> OptimizerConfig:
        return OptimizerConfig(
            name="muon",
            lr=lr,
            adam_lr=adam_lr,
            weight_decay=0.0,
            schedule="flat_linear",
            warmup=20.0,
        )

    return (
        PretrainPhase(
            mix="easy",
            shape=TrainShape(row_length=144, rows=14, steps=easy, checkpoint_every=200),
            optimizer=muon(0.04, 5e-3),
        ),
        PretrainPhase(
            mix="full",
            shape=TrainShape(row_length=208, rows=10, steps=full, checkpoint_every=200),
            optimizer=muon(0.03, 4e-3),
        ),
    )


def smoke(c: Any) -> None:
    """Every stage for a few steps, in few shapes; nothing is learned."""
    c.workdir = "runs/smoke"
    stage = c.stage
    stage.base = stage_dict("pretrain", phases=pretrain_phases(4, 4))
    stage.sft.demonstrations.count = 400
    stage.sft.shape.steps = 40
    stage.merge.alpha = (0.5, 0.9)
    stage.merge.sweep = (0.5,)
    stage.merge.validation.tasks, stage.merge.validation.skill_tasks = 4, 8
    stage.rl.shape.rows, stage.rl.shape.steps, stage.rl.shape.checkpoint_every = 8, 3, 2
    stage.rl.stream = to_config_dict(StreamConfig(2, 4, max_staleness=1, max_concurrent_groups=4))
    # An untrained agent earns nothing: groups without signal are kept.
    stage.rl.denoise = to_config_dict(DenoiseConfig(("environment",)))
    stage.rl.advantages.drop_zero = False
    stage.eval.tasks, stage.eval.skill_tasks = 8, 16
    for section in (stage.merge.validation, stage.rl, stage.eval):
        section.engine = to_config_dict(TEST_ENGINE)
