"""Asynchronous RL of a 4B agent: AgentCPM-Explore's released MiniRL recipe.

    python launch/train.py --config=configs/rl_qwen3_4b.py \\
        --config.stage.rl.init_from=runs/sft_qwen3_4b/sft/hf \\
        --config.tokenizer=runs/sft_qwen3_4b/sft/hf \\
        --config.stage.rl.tasks_path=data/tasks.jsonl \\
        --config.stage.rl.pool.urls='("http://host:30000",)'

Without the first two flags it begins with checkpoints/Qwen3-4B-Thinking-2507, as SFT does.

Hardware: a v5p-64 slice for training (4 rows of 131,072 tokens, each split over 8 chips), SGLang
servers for the rollouts; `--explain` says how many tokens a second they have to give, and what
all of it takes. Not timed; wall time and expected score are therefore not stated. Without
`pool.urls` the in-process engine decodes on four chips of the slice, far too slowly for this size.
`:runlocal` shrinks it to the tiny model and world.

Recipe: MiniRL with strict bounds [0.8, 1.3], leave-one-out advantages times 2 with sign clamp,
sequence sums averaged over sequences, 8 samples a task, 96 sequences a step, AdamW 2e-6 with betas
0.9 and 0.98 and weight decay 0.05, cosine after 10 warm-up steps, 1000 steps, context 131,072,
100 turns, repetition stop at 4, temperature 1.
Deviations: staleness is bounded (4 versions; the original has no bound), and the tasks are given
as a file of your own (the original's example names a benchmark's test set).
"""

from typing import Any

from agentcpm_jax.config import TrainShape, default_config, stage_dict, to_config_dict
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.mesh import MeshConfig
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rollout.config import EpisodeConfig, StreamConfig
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from configs.tiny import TEST_ENGINE, use_tiny_world


def get_config(variant: str = ""):
    """`variant`: '' or 'runlocal'."""
    c = recipe()
    if variant == "runlocal":
        runlocal(c)
    return c


def recipe() -> Any:
    """The released one."""
    c = default_config()
    c.name = "rl_qwen3_4b"
    c.workdir = "runs/rl_qwen3_4b"
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.mesh = to_config_dict(MeshConfig(fsdp=4, context=8))
    c.tokenizer = "checkpoints/Qwen3-4B-Thinking-2507"
    c.episode = to_config_dict(
        EpisodeConfig(
            max_turns=100,
            max_context=131_072,
            max_new_tokens=32_768,
            temperature=1.0,
            repetition_stop=4,
        )
    )
    c.stages = ("rl",)
    c.stage.rl = stage_dict(
        "rl",
        "checkpoints/Qwen3-4B-Thinking-2507",
        tasks_path="data/tasks.jsonl",
        shape=TrainShape(row_length=131_072, rows=4, micro_rows=4, steps=1000, checkpoint_every=3),
        optimizer=OptimizerConfig(
            name="adamw",
            lr=2e-6,
            b2=0.98,
            weight_decay=0.05,
            clip_norm=1.0,
            schedule="cosine",
            warmup=10.0,
        ),
        loss=LossConfig(
            name="minirl",
            eps_low=0.2,
            eps_high=0.3,
            aggregation="seq-mean-token-sum",
        ),
        advantages=AdvantageConfig(estimator="leave_one_out", scale=2.0, sign_clamp=True),
        stream=StreamConfig(batch_groups=12, group_size=8, max_staleness=4),
        engine=EngineConfig(slots=8, capacity=131_072, tensor=4),
    )
    return c


def runlocal(c: Any) -> None:
    """The tiny model and world; groups without signal are kept, for an untrained agent has few."""
    use_tiny_world(c)
    c.mesh = to_config_dict(MeshConfig())
    c.stage.rl.init_from = "random"
    c.stage.rl.tasks_path = None
    c.stage.rl.shape = to_config_dict(TrainShape(384, rows=8, micro_rows=8, steps=3))
    c.stage.rl.advantages.drop_zero = False
    c.stage.rl.denoise = to_config_dict(DenoiseConfig(("environment",)))
    c.stage.rl.stream = to_config_dict(StreamConfig(2, 4, max_staleness=1))
    c.stage.rl.engine = to_config_dict(TEST_ENGINE)
