"""Two sets of weights of the shipped agent, and what the trainer says under each."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.save import save_hf
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.logprobs import token_logprobs
from agentcpm_jax.pool.probe import Logprobs

FIRST = SHIPPED["shipped:sft"]
CONTEXT = 1024
VOCABULARY = 544


def two_weights(root: Path) -> tuple[str, str]:
    """The shipped agent, and the same with every matrix disturbed by a tenth of its scale."""
    second = root / "second"
    if not second.exists():
        params, cfg = load_hf(FIRST)
        leaves, treedef = jax.tree.flatten(params)
        rng = np.random.default_rng(1)
        moved = [x * (1 + 0.1 * rng.standard_normal(x.shape).astype(np.float32)) for x in leaves]
        save_hf(second, jax.tree.unflatten(treedef, moved), cfg, tokenizer_from=FIRST)
    return str(FIRST), str(second)


def other_model(root: Path) -> str:
    """A directory of the agent's vocabulary and tokenizer, and another width."""
    cfg = ModelConfig(VOCABULARY, 64, 2, num_heads=4, num_kv_heads=2, head_dim=16, ffw=96)
    path = root / "other"
    save_hf(path, model_params.init(jax.random.key(0), cfg), cfg, tokenizer_from=FIRST)
    return str(path)


def trainer_logprobs(path: str) -> Logprobs:
    """float32 on the CPU: i32[T] -> f32[T]."""
    params, cfg = load_hf(path)

    def logprobs(ids: np.ndarray) -> np.ndarray:
        width = next(w for w in (32, 256, CONTEXT) if w >= len(ids))
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(ids)] = ids
        positions = np.arange(width, dtype=np.int32)[None]
        segments = (positions < len(ids)).astype(np.int32)
        arrays = map(jnp.asarray, (padded, positions, segments))
        return np.asarray(_compiled()(params, cfg, *arrays))[0, : len(ids)]

    return logprobs


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., jax.Array]:
    return jax.jit(token_logprobs, static_argnums=1)
