"""The tiny agent on the offline world: the quickstart trains it, `:runlocal` shrinks to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from agentcpm_jax.config import to_config_dict
from agentcpm_jax.engine.local import EngineConfig
from agentcpm_jax.model.config import TINY
from agentcpm_jax.rollout.episode import EpisodeConfig
from agentcpm_jax.tasks.world import WorldTasks
from agentcpm_jax.world.graph import WorldConfig
from agentcpm_jax.world.vocabulary import SYSTEM_PROMPT

VOCABULARY = 544  # 516 words, bytes and phrases + 26 added tokens, padded to a multiple of 32
CONTEXT = 384  # tokens; a flawless 3-hop episode has about 250

#: The models in this package, Hugging Face directories made by experiments/make_base.py:
#: 'shipped:base', and 'shipped:sft', the quickstart's agent after SFT (for short runs and tests).
SHIPPED = {
    f"shipped:{name}": Path(__file__).resolve().parents[1] / "assets" / f"tiny_{name}"
    for name in ("base", "sft")
}

#: One bucket for everything: a test compiles little and decodes few rows.
TEST_ENGINE = EngineConfig(slots=16, capacity=CONTEXT, row_buckets=(), token_buckets=(64,))


def use_tiny_world(c: Any) -> None:
    """Replace model, tokenizer, episode and tasks of a top-level config by the tiny ones."""
    world = WorldConfig(entities=40, facts=4, family=4)
    c.model = to_config_dict(replace(TINY, vocab_size=VOCABULARY))
    c.tokenizer = ""
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
    c.train_tasks = to_config_dict(WorldTasks("train", worlds=300, per_world=16, world=world))
    c.test_tasks = to_config_dict(WorldTasks("test", worlds=60, seed=1, per_world=8, world=world))
