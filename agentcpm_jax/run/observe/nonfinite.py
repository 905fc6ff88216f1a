"""A loss that is no number stops the run and leaves behind what is needed to find out why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.types import UserError


def stop_if_not_finite(
    values: Mapping[str, Any],
    batch: Batch,
    directory: Path,
    name: str,
    step: int,
    issue_ids: Iterable[int] = (),
) -> None:
    """Dumps the batch of `step` as `directory`/nonfinite-step-<n>.npz; of several processes each
    dumps the rows that it made.

    The update itself changed nothing and no checkpoint of this step is made, so the newest
    checkpoint is the last good one. A gradient alone that overflows is skipped and counted.

    Raises:
      UserError: the loss is not finite; names the step and the issues of its batch.
    """
    loss = float(values["train/loss"])
    if math.isfinite(loss):
        return
    own = f".process-{jax.process_index()}" if jax.process_count() > 1 else ""
    path = directory / f"nonfinite-step-{step}{own}.npz"
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in vars(batch).items() if v is not None}
    np.savez_compressed(path, **arrays)
    ids = sorted(set(issue_ids))
    of_issues = f" of issues {', '.join(map(str, ids))}" if ids else ""
    raise UserError(
        f"{name}: the loss of step {step} is {loss}; the batch{of_issues} is in {path}, the last "
        "good checkpoint is kept; look for absurd rewards or weights in it, or lower the rate"
    )
