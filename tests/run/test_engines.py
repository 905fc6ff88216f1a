"""The quickstart's RL stage on a pool of `launch/serve.py` processes, from end to end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.pool.pool_training import check_training, train_on
from tests.pool.served_processes import our_servers

pytestmark = pytest.mark.runs


def test_the_reinforcement_stage_trains_on_our_servers(tmp_path: Path) -> None:
    with our_servers(2) as pool:
        rows = train_on([url for _, url in pool], tmp_path / "run")
    gaps = check_training(tmp_path / "run", rows)
    assert rows[-1]["pool/ready"] == 2
    assert np.quantile(gaps, 0.99) <= 1e-5 and gaps.max() <= 1e-4, gaps.max()
