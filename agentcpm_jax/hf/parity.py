"""The logits of a directory by transformers and by this package, in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.locate import find_model
from agentcpm_jax.hf.shape import shape_of
from agentcpm_jax.model.qwen3 import forward
from agentcpm_jax.types import UserError

LENGTHS = (1, 7, 64)  # tokens of the prompts
#: Of the largest logit: rounding through 36 layers makes a tenth of it, another model far more.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Parity:
    """The largest difference of two logits, and the largest logit."""

    difference: float
    largest: float

    @property
    def same(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= TOLERANCE * self.largest

    def text(self) -> str:
        """One line for people."""
        verdict = "the same model" if self.same else "NOT the same model"
        return (
            f"largest difference {self.difference:.2g} of logits up to {self.largest:.3g}, "
            f"{TOLERANCE * self.largest:.2g} allowed: {verdict}"
        )


def compare_logits(directory: str | Path) -> Parity:
    """Loads the model twice, one after the other, and compares what it says to random prompts.

    Raises:
      UserError: transformers or torch is missing, or the directory is not one of a Qwen3 model.
    """
    path = find_model(directory)
    cfg = shape_of(path)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, cfg.vocab_size, (1, length)) for length in LENGTHS]
    theirs = np.concatenate(_reference(path, prompts), axis=1)
    params, cfg = load_hf(path, replace(cfg, dtype="float32", param_dtype="float32"))
    ours = []
    with jax.default_matmul_precision("highest"):
        for ids in prompts:
            positions = jnp.arange(ids.shape[1])[None]
            segments = jnp.ones_like(positions)
            ours.append(np.asarray(forward(params, cfg, jnp.asarray(ids), positions, segments)))
    difference = np.abs(np.concatenate(ours, axis=1) - theirs)
    return Parity(float(difference.max()), float(np.abs(theirs).max()))


def _reference(path: Path, prompts: list[np.ndarray]) -> list[np.ndarray]:
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing: comparing logits needs transformers and torch; "
            "pip install 'agentcpm_jax[hf]' torch"
        ) from None
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        return [model(torch.from_numpy(ids)).logits.numpy() for ids in prompts]
