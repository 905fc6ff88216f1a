"""Optimisers and learning-rate schedules, all from optax.

Weight decay follows Hugging Face's Trainer: matrices (embeddings included) decay, norm scales and
biases do not. A stacked norm has the shape of a matrix, [L,D], so leaves are recognised by name.

Bytes of state for each parameter: adamw 8, with `moments="bfloat16"` 6 (the second moment stays
float32: at b2 = 0.999 an update changes it by less than bfloat16 can hold), adafactor (Shazeer and
Stern 2018, arXiv 1804.04235, without its own schedule and relative steps) near 0: the second moment
of a matrix is an outer product of its row and column means.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) orthogonalises the update of each
layer's matrices; embeddings, the lm_head and norms take Adam at `adam_lr` (with Nesterov's
look-ahead, as in optax) and do not decay. The matrices of all layers are stacked on axis 0, which
Muon treats as a batch axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.types import UserError

Schedule = Callable[[Any], jax.Array]

B1 = 0.9  # decay of the first moment: that of every published recipe
MUON_MOMENTUM = 0.95  # its author's
FLAT = 0.5  # share of the steps at the full rate with `flat_linear`


def make_optimizer(
    cfg: OptimizerConfig, total_steps: int | None = None
) -> tuple[optax.GradientTransformation, Schedule]:
    """(the optimiser, its schedule: number of updates made -> learning rate f32[]).

    Args:
      total_steps: updates of the stage, which the schedule is stretched over; None: not known.
    Raises:
      UserError: a schedule that needs `total_steps` and has none.
    """
    factor = make_schedule_factor(cfg, total_steps)

    def schedule(count: Any) -> jax.Array:
        return cfg.lr * factor(count)

    if cfg.name == "adamw":
        inner = optax.adamw(
            schedule,
            B1,
            cfg.b2,
            cfg.eps,
            mu_dtype=cfg.moments,
            weight_decay=cfg.weight_decay,
            mask=decay_mask,
        )
    elif cfg.name == "adafactor":
        inner = optax.chain(
            optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(cfg.weight_decay, decay_mask),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        inner = optax.contrib.muon(
            schedule,
            beta=MUON_MOMENTUM,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            adam_b1=B1,
            adam_b2=cfg.b2,
            adam_learning_rate=lambda count: cfg.adam_lr * factor(count),
            muon_weight_dimension_numbers=muon_dimensions,
        )
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm > 0 else optax.identity()
    return optax.chain(clip, inner), schedule


def make_schedule_factor(cfg: OptimizerConfig, total_steps: int | None) -> Schedule:
    """Number of updates made -> factor f32[] on the peak rate: linear warm-up, then `schedule`.

    As in Hugging Face's schedulers the first update of a warm-up has rate 0, and cosine is
    (1 + cos(pi p)) / 2 with p the share of the steps after the warm-up, here scaled to end at
    `final_fraction`.
    """
    if not total_steps and (cfg.schedule != "constant" or 0 < cfg.warmup < 1):
        raise UserError(
            f"schedule {cfg.schedule!r} with total_steps={total_steps}; set total_steps > 0"
        )
    total = total_steps or 0
    warmup = cfg.warmup_steps(total)
    final = cfg.final_fraction
    if final is None:
        final = 0.05 if cfg.schedule == "flat_linear" else 0.0
    decay_from = max(warmup, int(FLAT * total) if cfg.schedule == "flat_linear" else 0)

    def factor(count: Any) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((step - decay_from) / max(total - decay_from, 1), 0.0, 1.0)
        if cfg.schedule == "constant":
            shape = jnp.ones_like(progress)
        elif cfg.schedule == "cosine":
            shape = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        else:
            shape = 1.0 - progress
        after = final + (1.0 - final) * shape
        return jnp.where(step < warmup, step / max(warmup, 1), after)

    return factor


def decay_mask(params: Any) -> Any:
    """A tree of bools: True for the matrices, False for norm scales and biases."""
    return jax.tree.map_with_path(lambda path, _: not _is_vector(path), params)


def muon_dimensions(params: Any) -> Any:
    """Muon's matrix view of each parameter; None (Adam) for embeddings, lm_head and norms.

    Layer matrices are [L, in, out], [L, D, heads, H] (projections to heads) or [L, heads, H, D]
    (the output projection); L is a batch of matrices.
    """

    def dimensions(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if "layers" not in _keys(path) or _is_vector(path) or leaf.ndim < 3:
            return None
        if leaf.ndim == 3:
            return optax.contrib.MuonDimensionNumbers(1, 2)
        if _keys(path)[-1] in ("o", "wo", "o_proj"):
            return optax.contrib.MuonDimensionNumbers((1, 2), 3)
        return optax.contrib.MuonDimensionNumbers(1, (2, 3))

    return jax.tree.map_with_path(dimensions, params)


def _is_vector(path: tuple) -> bool:
    return any("norm" in key or "bias" in key for key in _keys(path))


def _keys(path: tuple) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]
