"""SFT of Qwen3-4B-Thinking-2507 on agent trajectories: AgentCPM-Explore's published recipe.

    python launch/train.py --config=configs/sft_qwen3_4b.py \\
        --config.stage.sft.init_from=checkpoints/Qwen3-4B-Thinking-2507 \\
        --config.tokenizer=checkpoints/Qwen3-4B-Thinking-2507 \\
        --config.stage.sft.data.path=data/agent_sft.jsonl

Hardware: a v5p-32 slice or larger (`--explain` says what it takes there). The step has not been
timed on one; wall time and expected score are therefore not stated. `:runlocal` shrinks it to the
tiny model on the offline world.

Recipe: sequences of at most 21,000 tokens (longer ones are dropped), every assistant turn trained,
AdamW 2e-5 cosine with 3 % warm-up, clip 1.0, 3 epochs.
Deviation: rows are packed with segment masks instead of one sequence per device, so a batch is a
number of tokens, not of sequences.
"""

from typing import Any

from agentcpm_jax.config import TrainShape, default_config, stage_dict, to_config_dict
from agentcpm_jax.data.sft import SFTDataConfig
from agentcpm_jax.rollout.config import EpisodeConfig
from agentcpm_jax.train.config import OptimizerConfig
from configs.tiny import train_on_the_world


def get_config(variant: str = ""):
    """`variant`: '' or 'runlocal'."""
    c = recipe()
    if variant == "runlocal":
        train_on_the_world(c, lr=1e-3)
    return c


def recipe() -> Any:
    """The published one."""
    c = default_config()
    c.name = "sft_qwen3_4b"
    c.workdir = "runs/sft_qwen3_4b"
    c.model.dtype, c.model.remat, c.model.lm_head_fp32 = "bfloat16", "full", False
    c.tokenizer = "checkpoints/Qwen3-4B-Thinking-2507"
    c.episode = to_config_dict(EpisodeConfig(max_context=128_768, max_new_tokens=32_768))
    c.stages = ("sft",)
    c.stage.sft = stage_dict(
        "sft",
        "checkpoints/Qwen3-4B-Thinking-2507",
        data=SFTDataConfig(path="data/agent_sft.jsonl", max_length=21_000, mask="all"),
        shape=TrainShape(row_length=21_504, rows=32, micro_rows=16),
        epochs=3,
        optimizer=OptimizerConfig(
            name="adamw",
            lr=2e-5,
            b2=0.999,
            weight_decay=0.01,
            clip_norm=1.0,
            schedule="cosine",
            warmup=0.03,
        ),
    )
    return c
