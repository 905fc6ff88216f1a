"""The backbone as a Linen module, for use inside Flax models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from agentcpm_jax.model import params as parameters
from agentcpm_jax.model import qwen3
from agentcpm_jax.model.attention.reference import Attention
from agentcpm_jax.model.config import ModelConfig


class Qwen3(nn.Module):
    """`qwen3.forward` with its parameters held by Flax.

    `init` is `params.init` and `apply` is `qwen3.forward`: the collection 'params' is exactly the
    tree that the rest of the package passes around. As a submodule it draws from the random
    stream that Flax gives it.
    """

    cfg: ModelConfig
    attention: Attention | None = None

    @nn.nowrap
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """{'params': params.init(key, cfg)}; `rngs` is a key or {'params': key}."""
        key = rngs["params"] if isinstance(rngs, Mapping) else rngs
        return {"params": parameters.init(key, self.cfg)}

    @nn.compact
    def __call__(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
    ) -> jax.Array:
        """Logits f32 [B, T, V]; arguments as in `qwen3.forward`."""
        params = {
            name: self.param(name, _initialiser(name, spec, self.cfg))
            for name, spec in parameters.param_specs(self.cfg).items()
        }
        return qwen3.forward(
            params, self.cfg, tokens, positions, segment_ids, attention=self.attention
        )


def _initialiser(name: str, spec: Any, cfg: ModelConfig) -> Any:
    return lambda key: parameters.draw(key, {name: spec}, cfg.param_dtype)[name]
