"""Reads the reference cases of this folder and compares our functions with them (numpy only).

Inputs and outputs were produced by executing the public functions that each case's `source` names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One reference case: `meta` is its record in index.json."""

    meta: dict[str, Any]
    inputs: Arrays
    expected: Arrays

    @property
    def id(self) -> str:
        return self.meta["id"]


def load(folder: Path = HERE) -> list[Case]:
    """All cases of a folder like this one, in the order of its index.json."""
    batches = dict(np.load(folder / "batches.npz"))
    stored = dict(np.load(folder / "outputs.npz"))
    cases = []
    for m in json.loads((folder / "index.json").read_text()):
        inputs = {n: batches[f"{m['batch']}/{n}"] for n in m["batch_inputs"]}
        inputs |= {n: stored[f"{m['id']}/in/{n}"] for n in m["case_inputs"]}
        expected = {n: stored[f"{m['id']}/out/{n}"] for n in m["outputs"]}
        cases.append(Case(m, inputs, expected))
    return cases


def check(case: Case, fn: Callable[[Arrays, dict[str, Any]], Arrays]) -> dict[str, str]:
    """What is wrong, by output name (empty: the case passes at its own tolerances)."""
    got = fn({k: v.copy() for k, v in case.inputs.items()}, dict(case.meta["params"]))
    mask = case.inputs.get("mask")
    wrong = {}
    for name, want in case.expected.items():
        if name not in got:
            wrong[name] = "missing"
            continue
        have, want = np.asarray(got[name], np.float64), np.asarray(want, np.float64)
        if have.shape != want.shape:
            wrong[name] = f"shape {have.shape} != {want.shape}"
        elif not np.isfinite(have).all():
            wrong[name] = "non-finite values"
        elif (np.abs(have - want) > case.meta["atol"] + case.meta["rtol"] * np.abs(want)).any():
            wrong[name] = f"off by up to {np.abs(have - want).max():.3g}"
        elif (
            name in ("grad", "weights", "keep_mask")
            and mask is not None
            and mask.shape == have.shape
            and (have[mask == 0] != 0).any()
        ):
            wrong[name] = "not exactly 0 where mask = 0"
    return wrong


def check_agentcpm(fn: Callable[..., list[float | None]]) -> list[str]:
    """Rows of the turn-advantage table that `fn(**row)` gets wrong (None = turn removed)."""
    wrong = []
    for row in json.loads((HERE / "agentcpm_advantage.json").read_text())["cases"]:
        want = row.pop("expected")
        got = fn(**row)
        same = len(got) == len(want) and all(
            (g is None) == (w is None) and (g is None or abs(g - w) <= 1e-6)
            for g, w in zip(got, want, strict=True)
        )
        if not same:
            wrong.append(f"{row}: {got} != {want}")
    return wrong
