"""Three engines with one face; and a stage on a pool of `launch/serve.py` processes, end to end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.engine.serving import ServedLocal
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.pool.config import PoolConfig
from agentcpm_jax.rollout.policy import Engine
from agentcpm_jax.run import engines
from agentcpm_jax.run.engines import PoolEngine
from tests.pool.pool_training import check_training, train_on
from tests.pool.served_processes import our_servers


class NoServers(engines.SGLangPool):
    """A pool that takes every update and has no workers."""

    def start(self, *what: Any) -> None: ...

    def update_weights(self, *what: Any) -> dict[str, str]:
        return {}


def test_all_engines_are_one_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, shape = SHIPPED["shipped:base"], EngineConfig(slots=1, capacity=16)
    params, model = load_hf(path)
    monkeypatch.setattr(engines, "SGLangPool", NoServers)
    cfg = SimpleNamespace(model=model, name="one", episode=SimpleNamespace(temperature=1.0))
    ctx: Any = SimpleNamespace(cfg=cfg, tokenizer=path, chat=None)
    ctx.directory, ctx.describe = lambda stage: tmp_path, lambda directory, weights: {}
    stage: Any = SimpleNamespace(name="rl")
    rl: Any = SimpleNamespace(pool=PoolConfig())
    local: Engine = LocalEngine(params, model, shape)
    served: Engine = ServedLocal(str(path), shape)
    pool: Engine = PoolEngine(ctx, stage, rl, params, 0)
    for engine in (local, served, pool):
        assert isinstance(engine, Engine)
        assert (engine.version, engine.tokens_sampled, engine.tokens_prefilled) == (0, 0, 0)
        engine.set_params(params, 1)
        assert engine.version == 1
        engine.close()


@pytest.mark.runs
def test_the_reinforcement_stage_trains_on_our_servers(tmp_path: Path) -> None:
    with our_servers(2) as pool:
        rows = train_on([url for _, url in pool], tmp_path / "run")
    gaps = check_training(tmp_path / "run", rows)
    assert rows[-1]["pool/ready"] == 2
    assert np.quantile(gaps, 0.99) <= 1e-5 and gaps.max() <= 1e-4, gaps.max()
