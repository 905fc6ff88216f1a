"""The tensors of the file format, spelt out: what the writer's streams are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from agentcpm_jax import tree
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.params import param_specs


def naive_tensors(
    params: Mapping[str, Any], cfg: ModelConfig, dtype: str | None = None
) -> dict[str, np.ndarray]:
    """{key: array} of a tree shaped like the parameters, gradients for instance."""
    found = {}
    flat = tree.flatten(params)
    for path, spec in tree.flatten(param_specs(cfg)).items():
        value = np.asarray(flat[path])
        for i, part in enumerate(value if spec.axes[0] == "layers" else [value]):
            if spec.hf_inputs:
                part = part.reshape(math.prod(part.shape[: spec.hf_inputs]), -1).T
            found[spec.hf_key.format(i)] = part.astype(jnp.dtype(dtype or part.dtype))
    return found
