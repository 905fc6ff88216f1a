"""The real 36-layer steps, compiled for TPU slices that are not here: do they compile and fit?

    make test-aot     the two rows of CI, with their limits
    make aot-table    every row, into experiments/results/aot.{json,md}

Each row is compiled in a process of its own, so that CPU seconds and memory are that row's. HBM is
argument + output - alias + temp of the compiler's memory analysis, per device; parameters and Adam
moments are float32, activations bfloat16, layers fully rematerialised. FLOPs are analytic (the
compiler's own count leaves out loops and Pallas kernels). Nothing is run: times are the roofline
(all arithmetic at the peak rate) and what 50 % of the model's FLOPs at peak would mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

from agentcpm_jax.model.config import QWEN3_0_6B, QWEN3_4B, ModelConfig
from agentcpm_jax.sharding import MeshConfig, make_mesh
from agentcpm_jax.train import flops
from agentcpm_jax.train.aot import compile_ahead, topology_devices
from agentcpm_jax.train.methods import LossConfig
from agentcpm_jax.train.optimizer import OptimizerConfig, make_optimizer
from agentcpm_jax.train.placement import (
    abstract_inputs,
    report_text,
    sharding_report,
    step_shardings,
)
from agentcpm_jax.train.step import make_rl_step, make_sft_step
from agentcpm_jax.types import UserError

GIB = 2**30
RESULTS = ROOT / "experiments" / "results"
# Logits from bfloat16 operands, summed in float32: products of float32 take a TPU six passes.
TRAINED = {"param_dtype": "float32", "remat": "full", "lm_head_fp32": False}
BIG = dataclasses.replace(QWEN3_4B, **TRAINED)
SMALL = dataclasses.replace(QWEN3_0_6B, **TRAINED)


@dataclasses.dataclass(frozen=True)
class Row:
    """One step to compile; limits are per device (GiB) and for the compiler (CPU s, GiB)."""

    kind: str  # sft | rl
    slice: str
    model: ModelConfig
    row_length: int
    rows: int
    mesh: MeshConfig
    expected: tuple[str, ...] = ("all-gather",)  # collectives that must be there
    hbm_limit: float = 0.0
    cpu_limit: float = 240.0
    rss_limit: float = 3.0


ROWS = {
    "rl-128k-v5p-64": Row(
        "rl", "v5p-64", BIG, 131_072, 4, MeshConfig(fsdp=4, context=8), hbm_limit=14.0
    ),
    "sft-4k-v6e-64": Row("sft", "v6e-64", BIG, 4096, 64, MeshConfig(fsdp=64), hbm_limit=7.5),
    "sft-32k-v5p-32": Row("sft", "v5p-32", BIG, 32_768, 16, MeshConfig(fsdp=16)),
    "sft-4k-v5p-32": Row("sft", "v5p-32", BIG, 4096, 16, MeshConfig(fsdp=16)),
    "sft-4k-0.6b-v5e-1": Row("sft", "v5e-1", SMALL, 4096, 1, MeshConfig(fsdp=1), expected=()),
}
CHECKED = ("rl-128k-v5p-64", "sft-4k-v6e-64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="the rows of CI; fails on a limit")
    parser.add_argument("--rows", default="", help="names, comma-separated; default: all")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)  # the process of one row
    parser.add_argument("--report", action="store_true", help="print the sharding of every array")
    flags = parser.parse_args()
    if flags.row:
        print("RESULT " + json.dumps(compile_row(flags.row, flags.report)))
        return
    names = CHECKED if flags.check else tuple(filter(None, flags.rows.split(","))) or tuple(ROWS)
    found = [in_process(name, flags.report) for name in names]
    print(table(found))
    if not flags.check and not flags.rows:
        write(found)
    failures = [failure for row in found for failure in broken_limits(row)]
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


def compile_row(name: str, report: bool) -> dict[str, Any]:
    """Compiles one row in this process."""
    row = ROWS[name]
    devices = topology_devices(row.slice)
    mesh = make_mesh(row.mesh, devices)
    tx, schedule = make_optimizer(OptimizerConfig(schedule="constant"))
    shardings = step_shardings(mesh, row.model, tx, row.rows)
    state, batch = abstract_inputs(row.model, tx, row.rows, row.row_length, shardings)
    if report:
        print(report_text(sharding_report({"state": state, "batch": batch})), flush=True)
    if row.kind == "rl":
        step = make_rl_step(row.model, LossConfig(), tx, schedule, shardings=shardings)
        arguments: tuple[Any, ...] = (state, batch, jax.ShapeDtypeStruct((), jnp.int32))
    else:
        step = make_sft_step(row.model, tx, schedule, shardings=shardings)
        arguments = (state, batch)
    start = time.perf_counter()
    done = compile_ahead(step, *arguments)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    chip = flops.CHIPS[row.slice.split("-")[0]]
    useful = flops.train_flops(row.model, row.rows, row.row_length)
    needed = flops.hardware_flops(row.model, row.rows, row.row_length)
    return {
        "row": name,
        "mesh": {axis: size for axis, size in mesh.shape.items() if size > 1},
        "devices": mesh.size,
        "tokens": row.rows * row.row_length,
        "hbm_gib": done.hbm_bytes / GIB,
        "argument_gib": done.argument_bytes / GIB,
        "temp_gib": done.temp_bytes / GIB,
        "device_gib": chip.hbm_bytes / GIB,
        "collectives": done.collectives,
        "splash_calls": done.pallas_calls,
        "model_flops": useful,
        "roofline_s": flops.step_seconds(needed, chip, mesh.size, 1.0),
        "half_mfu_s": flops.step_seconds(useful, chip, mesh.size, 0.5),
        "compile_wall_s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "rss_gib": usage.ru_maxrss / 2**20,
    }


def in_process(name: str, report: bool) -> dict[str, Any]:
    """`compile_row` in a process of its own."""
    if name not in ROWS:
        raise UserError(f"unknown row {name!r}; use one of {', '.join(ROWS)}")
    command = [sys.executable, __file__, f"--row={name}"] + ["--report"] * report
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    found = [line for line in lines if line.startswith("RESULT ")]
    if report:
        print("\n".join(line for line in lines if line not in found))
    if not found:
        return {"row": name, "error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(found[-1].removeprefix("RESULT "))


def broken_limits(found: dict[str, Any]) -> list[str]:
    """What a row promises and does not keep."""
    name, row = found["row"], ROWS[found["row"]]
    if "error" in found:
        return [f"{name}: {found['error']}"]
    broken = []
    limits = (
        ("hbm_gib", row.hbm_limit or found["device_gib"], "GiB of HBM per device"),
        ("cpu_s", row.cpu_limit, "CPU s to compile"),
        ("rss_gib", row.rss_limit, "GiB of memory to compile"),
    )
    for key, limit, unit in limits:
        if found[key] > limit:
            broken.append(f"{name}: {found[key]:.2f} {unit}, at most {limit:.2f} allowed")
    if not found["splash_calls"]:
        broken.append(f"{name}: no splash attention in the program")
    broken += [f"{name}: no {c}" for c in row.expected if not found["collectives"][c]]
    return broken


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, a line per row."""
    lines = [
        "| step | mesh | tokens | HBM GiB of | arguments, temporaries | collectives | model TFLOP "
        "| roofline s | s at 50 % MFU | compile CPU s, GiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in found:
        if "error" in r:
            lines.append(f"| {r['row']} | {r['error']} |" + " |" * 8)
            continue
        mesh = ", ".join(f"{axis} {size}" for axis, size in r["mesh"].items()) or "1 device"
        ops = ", ".join(f"{n} {c}" for c, n in r["collectives"].items() if n) or "none"
        lines.append(
            f"| {r['row']} | {mesh} | {r['tokens']:,} | {r['hbm_gib']:.2f} of "
            f"{r['device_gib']:.2f} | {r['argument_gib']:.2f}, {r['temp_gib']:.2f} | {ops} | "
            f"{r['model_flops'] / 1e12:,.0f} | {r['roofline_s']:.2f} | {r['half_mfu_s']:.2f} | "
            f"{r['cpu_s']:.0f}, {r['rss_gib']:.1f} |"
        )
    return "\n".join(lines)


def write(found: list[dict[str, Any]]) -> None:
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu", "optax")}
    about = {
        "command": "make aot-table",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no accelerator",
        "python": platform.python_version(),
        "versions": versions,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "aot.json").write_text(json.dumps(about | {"rows": found}, indent=1) + "\n")
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    note = f"`make aot-table`, Python {about['python']}, {listed}; nothing was run on a TPU.\n"
    (RESULTS / "aot.md").write_text(f"{note}\n{table(found)}\n")


if __name__ == "__main__":
    main()
