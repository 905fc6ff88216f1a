"""State on a mesh: moments beside their parameters, factors replicated; the printed report."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest

from agentcpm_jax.mesh import AXES
from agentcpm_jax.model.config import TINY
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.placement import (
    abstract_inputs,
    report_text,
    sharding_report,
    step_shardings,
)
from agentcpm_jax.types import UserError

MODEL = dataclasses.replace(TINY, vocab_size=512, width=256, ffw=512)
MESH: Any = jax.sharding.AbstractMesh((1, 2, 2, 2), AXES)


def report(**optimizer: Any) -> dict[str, Any]:
    model = dataclasses.replace(MODEL, lora_rank=optimizer.pop("lora_rank", 0))
    tx, _ = make_optimizer(OptimizerConfig(schedule="constant", **optimizer))
    shardings = step_shardings(MESH, model, tx, 4)
    state, batch = abstract_inputs(model, tx, 4, 64, shardings)
    return {row.path: row for row in sharding_report({"state": state, "batch": batch})}


def test_moments_lie_beside_their_parameters() -> None:
    rows = report()
    q = rows["state/params/layers/attn/q"]
    assert (q.shape, q.dtype, q.spec) == ((3, 256, 4, 32), "float32", "-,fsdp+context,tensor,-")
    assert q.device_bytes == 4 * 3 * 256 * 4 * 32 // 8
    (mu,) = (row for path, row in rows.items() if path.endswith("mu/layers/attn/q"))
    assert mu[1:] == q[1:]
    tokens = rows["batch/tokens"]
    assert (tokens.spec, tokens.device_bytes) == ("data+fsdp,context", 4 * 4 * 64 // 4)


def test_bfloat16_moments_halve_the_first_alone() -> None:
    rows = report(moments="bfloat16")
    found = {
        name: next(row for path, row in rows.items() if f"/{name}/" in path).dtype
        for name in ("mu", "nu")
    }
    assert found == {"mu": "bfloat16", "nu": "float32"}


def test_adafactor_keeps_rows_and_columns() -> None:
    rows = report(name="adafactor")
    state = sum(r.device_bytes for p, r in rows.items() if "opt_state" in p)
    params = sum(r.device_bytes for p, r in rows.items() if p.startswith("state/params"))
    assert state < params
    assert all(
        r.spec == "replicated" for p, r in rows.items() if "v_row" in p and "layers/mlp" in p
    )


def test_muon_splits_its_momentum_and_the_moments_of_what_it_leaves_to_adam() -> None:
    rows = report(name="muon")
    params = {p.removeprefix("state/params/"): r for p, r in rows.items() if "state/params" in p}
    momentum = [r for p, r in rows.items() if "opt_state" in p and p.endswith("mlp/gate")]
    assert momentum and all(r.spec == params["layers/mlp/gate"].spec for r in momentum)
    adam = [r for p, r in rows.items() if "opt_state" in p and p.endswith("/embed")]
    assert len(adam) == 2 and all(r[1:] == params["embed"][1:] for r in adam)


def test_adapters_are_all_that_is_trained() -> None:
    rows = report(lora_rank=4)
    params = {p for p in rows if p.startswith("state/params")}
    assert len(params) == 14 and all(p.endswith(("/a", "/b")) for p in params)
    assert rows["state/params/attn/q/a"].spec == "-,fsdp+context,-"


def test_the_report_is_a_table_with_a_total() -> None:
    lines = report_text(list(report().values())).splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "spec", "MiB/device"]
    assert lines[-1].startswith("total") and len({len(line) for line in lines}) == 1


def test_rows_that_do_not_split_are_refused_with_the_nearest() -> None:
    tx, _ = make_optimizer(OptimizerConfig(schedule="constant"))
    with pytest.raises(UserError, match=r"5 rows .* data 1 x fsdp 2 .* the nearest is 4"):
        step_shardings(MESH, MODEL, tx, 5)
