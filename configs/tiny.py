"""The smallest pipeline that still learns to speak: SFT, then deterministic RL. Used by the tests.

    python launch/train.py --config=configs/tiny.py            # lockstep: resume is bit for bit
    python launch/train.py --config=configs/tiny.py:async      # rollouts overlap with training

Less than a minute on two CPU cores. After 60 steps of SFT the shipped tiny base answers some 1-hop
questions; six steps of RL show the machinery, not a result.
"""

from agentcpm_jax.config import Demonstrations, TrainShape, default_config, stage_dict
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
    c.episode.max_turns = 6
    c.train_tasks.hops = (1,)
    c.stages = ("sft", "rl")
    c.stage.sft = stage_dict(
        "sft",
        "shipped",
        demonstrations=Demonstrations(count=400),
        shape=TrainShape(row_length=256, rows=4, steps=60),
        optimizer=OptimizerConfig(lr=4e-3, schedule="cosine", warmup_steps=5, weight_decay=0.0),
    )
    c.stage.rl = stage_dict(
        "rl",
        "stage:sft",
        shape=TrainShape(row_length=384, rows=4, micro_rows=4, steps=6, checkpoint_every=2),
        optimizer=OptimizerConfig(lr=1e-3, schedule="constant", weight_decay=0.0),
        denoise=DenoiseConfig(("environment",)),
        advantages=AdvantageConfig(estimator="leave_one_out", sign_clamp=False, drop_zero=False),
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
