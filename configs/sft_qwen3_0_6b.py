"""SFT of Qwen3-0.6B on one small accelerator: every parameter is trained.

    python launch/train.py --config=configs/sft_qwen3_0_6b.py \\
        --config.stage.sft.init_from=checkpoints/Qwen3-0.6B \\
        --config.tokenizer=checkpoints/Qwen3-0.6B \\
        --config.stage.sft.data.path=data/agent_sft.jsonl

Hardware: one v5e chip (the step is compiled for it ahead of time and fits, see
experiments/results/aot.md), `:t4` one T4 (an estimate). Not timed; wall time and expected score
are therefore not stated. `--explain` says what it takes, `:runlocal` shrinks it to the tiny model.

A T4 has no bfloat16: there the step computes in float32, with attention in blocks, and says so.
"""

from typing import Any

from agentcpm_jax.config import TrainShape, default_config, stage_dict, to_config_dict
from agentcpm_jax.data.sft import SFTDataConfig
from agentcpm_jax.rollout.config import EpisodeConfig
from agentcpm_jax.train.config import OptimizerConfig
from configs.tiny import train_on_the_world


def get_config(variant: str = ""):
    """`variant`: '' (v5e-1), 't4' or 'runlocal'."""
    c = recipe()
    if variant == "t4":
        t4(c)
    if variant == "runlocal":
        train_on_the_world(c, lr=1e-3)
    return c


def recipe() -> Any:
    """Rows of 4,096 tokens on a v5e chip."""
    c = default_config()
    c.name = "sft_qwen3_0_6b"
    c.workdir = "runs/sft_qwen3_0_6b"
    c.model.dtype, c.model.remat, c.model.lm_head_fp32 = "bfloat16", "full", False
    c.tokenizer = "checkpoints/Qwen3-0.6B"
    c.episode = to_config_dict(EpisodeConfig(max_context=4096, max_new_tokens=1024))
    c.stages = ("sft",)
    c.stage.sft = stage_dict(
        "sft",
        "checkpoints/Qwen3-0.6B",
        data=SFTDataConfig(path="data/agent_sft.jsonl", max_length=4096, mask="all"),
        shape=TrainShape(row_length=4096, rows=2),
        epochs=3,
        optimizer=OptimizerConfig(lr=1e-5, weight_decay=0.01, schedule="cosine", warmup=0.03),
    )
    return c


def t4(c: Any) -> None:
    """A quarter of the tokens, and half of the first moment's bytes."""
    c.episode.max_context = c.stage.sft.data.max_length = c.stage.sft.shape.row_length = 1024
    c.episode.max_new_tokens = 256
    c.stage.sft.optimizer.moments = "bfloat16"
