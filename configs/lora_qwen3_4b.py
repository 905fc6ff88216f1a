"""SFT of Qwen3-4B on one small accelerator: adapters of rank 16 are trained, the rest is frozen.

    python launch/train.py --config=configs/lora_qwen3_4b.py \\
        --config.stage.sft.init_from=checkpoints/Qwen3-4B-Thinking-2507 \\
        --config.tokenizer=checkpoints/Qwen3-4B-Thinking-2507 \\
        --config.stage.sft.data.path=data/agent_sft.jsonl

The stage leaves hf/ (merged) and adapter/ (PEFT's format).

Hardware: one v5e chip (the step is compiled for it ahead of time and fits, see
experiments/results/aot.md), `:t4` one T4 (an estimate). Not timed; wall time and expected score
are therefore not stated. `--explain` says what it takes, `:runlocal` shrinks it to the tiny model.

A T4 has no bfloat16: there the step computes in float32 from the bfloat16 parameters, with
attention in blocks, and says so.
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
        train_on_the_world(c, lr=1e-2)
        c.model.lora_rank = 8
    return c


def recipe() -> Any:
    """Rows of 4,096 tokens on a v5e chip."""
    c = default_config()
    c.name = "lora_qwen3_4b"
    c.workdir = "runs/lora_qwen3_4b"
    c.model.dtype = c.model.param_dtype = "bfloat16"
    c.model.remat, c.model.lm_head_fp32, c.model.lora_rank = "full", False, 16
    c.tokenizer = "checkpoints/Qwen3-4B-Thinking-2507"
    c.episode = to_config_dict(EpisodeConfig(max_context=4096, max_new_tokens=1024))
    c.stages = ("sft",)
    c.stage.sft = stage_dict(
        "sft",
        "checkpoints/Qwen3-4B-Thinking-2507",
        data=SFTDataConfig(path="data/agent_sft.jsonl", max_length=4096, mask="all"),
        shape=TrainShape(row_length=4096, rows=2),
        epochs=3,
        # Ten times the rate of full fine-tuning, as is usual for adapters; they do not decay.
        optimizer=OptimizerConfig(lr=2e-4, weight_decay=0.0, schedule="cosine", warmup=0.03),
    )
    return c


def t4(c: Any) -> None:
    """An eighth of the tokens in a batch."""
    c.episode.max_context = c.stage.sft.data.max_length = c.stage.sft.shape.row_length = 1024
    c.episode.max_new_tokens = 256
    c.stage.sft.shape.rows = 1
