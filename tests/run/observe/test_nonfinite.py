"""A loss that is no number stops, names step and issues, and leaves the batch behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.run.observe.nonfinite import stop_if_not_finite
from agentcpm_jax.types import UserError


def test_the_batch_is_dumped_and_its_issues_are_named(tmp_path: Path) -> None:
    batch = Batch.empty(2, 4).replace(tokens=np.arange(8, dtype=np.int32).reshape(2, 4))
    stop_if_not_finite({"train/loss": 1.0}, batch, tmp_path, "rl", 3, (7,))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"rl: the loss of step 3 is nan; .* of issues 7, 12 is in"):
        stop_if_not_finite({"train/loss": np.nan}, batch, tmp_path, "rl", 3, (12, 7, 12))
    found = np.load(tmp_path / "nonfinite-step-3.npz")
    np.testing.assert_array_equal(found["tokens"], batch.tokens)
    assert "loss_mask" in found and "proximal_logprobs" not in found
