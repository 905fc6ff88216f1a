"""A minute of RL on the tiny agent, for tests and first experiments.

    python launch/train.py --config=configs/tiny.py            # lockstep: resume is bit for bit
    python launch/train.py --config=configs/tiny.py:async      # rollouts overlap with training

It starts from the shipped agent after SFT. Six steps of two groups show the machinery, not a
result.
"""

from agentcpm_jax.config import TrainShape, default_config, stage_dict
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rollout.stream import StreamConfig
from agentcpm_jax.run.tiny import TEST_ENGINE, use_tiny_world
from agentcpm_jax.train.optimizer import OptimizerConfig


def get_config(variant: str = ""):
    """`variant`: '' or 'async'."""
    c = default_config()
    c.name = "tiny"
    c.workdir = "runs/tiny"
    use_tiny_world(c)
    c.stages = ("rl",)
    c.stage.rl = stage_dict(
        "rl",
        "shipped:sft",
        shape=TrainShape(row_length=384, rows=4, micro_rows=4, steps=6, checkpoint_every=2),
        optimizer=OptimizerConfig(lr=3e-4, schedule="constant", weight_decay=0.0),
        # Groups without signal are kept: with two groups a step, few would be left.
        denoise=DenoiseConfig(("environment",)),
        advantages=AdvantageConfig(drop_zero=False),
        stream=StreamConfig(
            batch_groups=2,
            group_size=4,
            max_staleness=1,
            max_concurrent_groups=4,
            deterministic=variant != "async",
        ),
        engine=TEST_ENGINE,
    )
    return c
