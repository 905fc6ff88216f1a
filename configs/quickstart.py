"""The whole pipeline on a laptop CPU: base -> SFT -> merge -> asynchronous RL -> evaluation.

    make quickstart        or        python launch/train.py --config=configs/quickstart.py

Variants: `:smoke` runs every stage in about a minute and learns nothing; `--config.base=scratch`
trains the base in the run instead of using the shipped one.
"""

from agentcpm_jax.config import (
    Demonstrations,
    EvalStage,
    PretrainPhase,
    TrainShape,
    default_config,
    stage_dict,
)
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rollout.config import StreamConfig
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.world.skills import SkillMix
from configs.tiny import CONTEXT, TEST_ENGINE, use_tiny_world


def get_config(variant: str = ""):
    """`variant`: '' or 'smoke'."""
    smoke = variant == "smoke"
    c = default_config()
    c.name = "quickstart"
    c.workdir = "runs/smoke" if smoke else "runs/quickstart"
    c.base = "shipped:base"
    use_tiny_world(c)
    engine = EngineConfig(slots=96, capacity=CONTEXT, row_buckets=(24,), length_buckets=(192,))
    denoise, advantages = DenoiseConfig(), AdvantageConfig()
    if smoke:  # an untrained agent earns nothing: keep groups without signal, in few shapes
        engine = TEST_ENGINE
        denoise, advantages = DenoiseConfig(("environment",)), AdvantageConfig(drop_zero=False)

    c.stages = ("base", "sft", "merge", "rl", "eval")
    c.stage.base = stage_dict("pretrain", phases=pretrain_phases(smoke))
    c.stage.sft = stage_dict(
        "sft",
        "stage:base",
        demonstrations=Demonstrations(count=400 if smoke else 5000, wrong_pick=0.1, stop_early=0.6),
        shape=TrainShape(row_length=256, rows=8, steps=40 if smoke else 400),
        optimizer=OptimizerConfig(
            name="adamw",
            lr=2e-3,
            b2=0.95,
            eps=5e-7,
            weight_decay=0.0,
            schedule="cosine",
            warmup_steps=20,
            final_fraction=0.05,
        ),
    )
    c.stage.merge = stage_dict(
        "merge",
        "stage:sft",
        candidates=(0.5, 0.9) if smoke else (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9),
        keep=0.93,
        validation=EvalStage(
            tasks=4 if smoke else 64, skill_tasks=8 if smoke else 100, engine=engine
        ),
        sweep=(0.5,) if smoke else (0.5, 0.7, 0.9),
    )
    c.stage.rl = stage_dict(
        "rl",
        "stage:merge",
        shape=TrainShape(
            row_length=504,  # some trajectories are short: longer rows leave less padding
            rows=8 if smoke else 32,
            micro_rows=1,
            steps=3 if smoke else 40,
            checkpoint_every=2 if smoke else 10,
        ),
        optimizer=OptimizerConfig(
            name="adamw",
            lr=6e-4,
            b2=0.95,
            eps=1e-5,
            weight_decay=0.0,
            schedule="constant",
            warmup_steps=3,
        ),
        loss=LossConfig(name="minirl"),
        denoise=denoise,
        advantages=advantages,
        stream=StreamConfig(
            batch_groups=2 if smoke else 12,
            group_size=4 if smoke else 8,
            max_staleness=1,
            max_concurrent_groups=4 if smoke else 16,
        ),
        engine=engine,
    )
    c.stage.eval = stage_dict(
        "eval",
        models=("base", "sft", "merge", "rl"),
        tasks=8 if smoke else 400,
        samples=4,
        skill_tasks=16 if smoke else 200,
        engine=engine,
    )
    return c


def pretrain_phases(smoke: bool) -> tuple[PretrainPhase, ...]:
    """Short rows and easy pages first, then longer pages: copying appears sooner that way."""

    def muon(lr: float, adam_lr: float) -> OptimizerConfig:
        return OptimizerConfig(
            name="muon",
            lr=lr,
            adam_lr=adam_lr,
            weight_decay=0.0,
            schedule="flat_linear",
            flat_fraction=0.5,
            warmup_steps=20,
        )

    easy = SkillMix(
        recall=5.0, sort=1.0, add=2.0, repeat=1.5, recall_facts=(2, 4), recall_pages=(1, 1)
    )
    return (
        PretrainPhase(
            easy, row_length=144, rows=14, steps=4 if smoke else 1000, optimizer=muon(0.04, 5e-3)
        ),
        PretrainPhase(
            SkillMix(add=1.5),
            row_length=208,
            rows=10,
            steps=4 if smoke else 500,
            optimizer=muon(0.03, 4e-3),
        ),
    )
