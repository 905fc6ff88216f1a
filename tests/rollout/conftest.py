"""What the tests of streams share."""

from __future__ import annotations

import pytest

from agentcpm_jax.rollout import groups


@pytest.fixture(autouse=True)
def failed_samples_are_tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "RETRY_DELAY", 0.0)
