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

from dataclasses import replace

from agentcpm_jax.config import (
    Demonstrations,
    TrainShape,
    default_config,
    stage_dict,
    to_config_dict,
)
from agentcpm_jax.data.sft import SFTDataConfig
from agentcpm_jax.model.config import QWEN3_0_6B
from agentcpm_jax.rollout.config import EpisodeConfig
from agentcpm_jax.train.config import OptimizerConfig
from configs.tiny import use_tiny_world


def get_config(variant: str = ""):
    """`variant`: '' (v5e-1), 't4' or 'runlocal'."""
    t4 = variant == "t4"
    length = 1024 if t4 else 4096
    c = default_config()
    c.name = "sft_qwen3_0_6b"
    c.workdir = "runs/sft_qwen3_0_6b"
    trained = replace(QWEN3_0_6B, param_dtype="float32", remat="full", lm_head_fp32=False)
    c.model = to_config_dict(trained)
    c.tokenizer = "checkpoints/Qwen3-0.6B"
    c.episode = to_config_dict(EpisodeConfig(max_context=length, max_new_tokens=length // 4))
    c.stages = ("sft",)
    c.stage.sft = stage_dict(
        "sft",
        "checkpoints/Qwen3-0.6B",
        data=SFTDataConfig(path="data/agent_sft.jsonl", max_length=length, mask="all"),
        shape=TrainShape(row_length=length, rows=2),
        epochs=3,
        optimizer=OptimizerConfig(
            lr=1e-5,
            weight_decay=0.01,
            schedule="cosine",
            warmup_fraction=0.03,
            moments="bfloat16" if t4 else "float32",
        ),
    )
    if variant == "runlocal":
        use_tiny_world(c)
        c.stage.sft = stage_dict(
            "sft",
            demonstrations=Demonstrations(count=64),
            shape=TrainShape(row_length=256, rows=4, steps=4),
            optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_fraction=0.03),
        )
    return c
