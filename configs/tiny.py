"""A minute of RL on the tiny agent, for tests and first experiments.

    python launch/train.py --config=configs/tiny.py            # lockstep: resume is bit for bit
    python launch/train.py --config=configs/tiny.py:async      # rollouts overlap with training

It starts from the shipped agent after SFT. Six steps of two groups show the machinery, not a
result. `use_tiny_world` and `train_on_the_world` are what the other configurations shrink to.
"""

from dataclasses import replace
from typing import Any

from agentcpm_jax.config import (
    Demonstrations,
    TrainShape,
    default_config,
    stage_dict,
    to_config_dict,
)
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.model.config import TINY
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rollout.config import EpisodeConfig, StreamConfig
from agentcpm_jax.tasks.world import WorldTasks
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.world.vocabulary import SYSTEM_PROMPT

VOCABULARY = 544  # 516 words, bytes and phrases + 26 added tokens, padded to a multiple of 32
CONTEXT = 384  # tokens; a flawless 3-hop episode has about 250

#: One bucket for everything: a test compiles little and decodes few rows.
TEST_ENGINE = EngineConfig(slots=16, capacity=CONTEXT, row_buckets=(), token_buckets=(64,))


def get_config(variant: str = ""):
    """`variant`: '' or 'async'."""
    c = recipe()
    if variant == "async":
        c.stage.rl.stream.deterministic = False
    return c


def recipe() -> Any:
    """Lockstep RL from the shipped agent."""
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
            deterministic=True,
        ),
        engine=TEST_ENGINE,
    )
    return c


def use_tiny_world(c: Any) -> None:
    """Replace model, tokenizer, episode and tasks of a top-level config by the tiny ones."""
    c.model = to_config_dict(replace(TINY, vocab_size=VOCABULARY))
    c.tokenizer = None
    c.template = "qwen3-instruct-2507"
    c.episode = to_config_dict(
        EpisodeConfig(
            system_prompt=SYSTEM_PROMPT,
            max_turns=12,
            max_context=CONTEXT,
            max_new_tokens=32,
            reserve=8,
        )
    )
    c.train_tasks = to_config_dict(WorldTasks("train", worlds=300, per_world=16))
    c.test_tasks = to_config_dict(WorldTasks("test", worlds=60, per_world=8))


def train_on_the_world(c: Any, lr: float) -> None:
    """Replace the SFT stage by four steps of the tiny model on the world's demonstrations."""
    use_tiny_world(c)
    c.stage.sft = stage_dict(
        "sft",
        demonstrations=Demonstrations(count=64),
        shape=TrainShape(row_length=256, rows=4, steps=4),
        optimizer=OptimizerConfig(lr=lr, schedule="cosine", warmup=0.03),
    )
