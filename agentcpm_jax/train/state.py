"""What a train step carries from update to update."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
    """Parameters and optimiser state after `step` updates, of which `skipped` changed nothing.

    step i32[], skipped i32[] (updates with a non-finite loss or gradient), params and opt_state
    pytrees. Donated to the step that consumes it.
    """

    step: Any  # arrays; or, when the tree is mapped over, shardings and shapes in their place
    skipped: Any
    params: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Any, tx: optax.GradientTransformation) -> TrainState:
        """Step 0. The state holds `params` itself: copy them first to use them elsewhere."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
        )
