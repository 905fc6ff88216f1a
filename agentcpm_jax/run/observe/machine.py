"""The machine that computed a step: only the same kind and the same jaxlib give the same bits."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from agentcpm_jax import tree
from agentcpm_jax.config import TrainShape
from agentcpm_jax.files import append_line
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.observe.metrics import read_lines

FILE = "machines.jsonl"


def describe() -> dict[str, Any]:
    """Everything of this process that may change the bits of a step. JSON-able."""
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "platform": device.platform,
        "device": str(device.device_kind),
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "processor": _processor(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
    }


def start_line(ctx: RunContext, name: str, shape: TrainShape, start: int) -> str:
    """What a stage computes, on what, and from where."""
    model = ctx.cfg.model
    parameters = sum(math.prod(spec.shape) for spec in tree.flatten(param_specs(model)).values())
    adapters = f" with adapters of rank {model.lora_rank}" if model.lora_rank else ""
    axes = " x ".join(f"{axis} {size}" for axis, size in ctx.mesh.shape.items() if size > 1)
    at = f"resumed after step {start} of" if start else "from the first of"
    return (
        f"{name}: {ctx.mesh.size} x {jax.devices()[0].device_kind}, mesh {axes or 'of one'}; "
        f"{parameters:,} parameters{adapters}; {shape.rows} rows of {shape.row_length} tokens; "
        f"{at} {shape.steps} steps"
    )


def record(directory: Path, completed: int) -> None:
    """Writes in a stage's directory that this machine computes the steps after `completed`."""
    directory.mkdir(parents=True, exist_ok=True)
    append_line(directory / FILE, json.dumps({"after": completed} | describe()))


def of_step(directory: Path, step: int) -> dict[str, Any]:
    """The machine that computed `step` (1 = the first) last; empty when nothing was recorded."""
    rows = [row for row in read_lines(directory / FILE, "after") if row["after"] < step]
    return {k: v for k, v in rows[-1].items() if k != "after"} if rows else {}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """`jaxlib 0.10.2, here 0.12.0` for each fact that differs."""
    return [
        f"{name} {there[name]!r}, here {here[name]!r}"
        for name in here
        if name in there and there[name] != here[name]
    ]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
