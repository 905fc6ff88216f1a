"""The real 36-layer steps, compiled for TPU slices that are not here: do they compile and fit?

    make test-aot     the two rows of CI, with their limits
    make aot-table    every row, into experiments/results/aot.{json,md}

Each row is compiled in a process of its own, so that CPU seconds and memory are that row's. HBM is
argument + output - alias + temp of the compiler's memory analysis, per device; parameters and Adam
moments are float32 (of adapters: the frozen base is bfloat16), activations bfloat16, layers fully
rematerialised. FLOPs are analytic (the compiler's own count leaves out loops and Pallas kernels).
Nothing is run: times are the roofline (all arithmetic at the peak rate) and what 50 % of the
model's FLOPs at peak would mean. Rows of other accelerators are estimates and say so.
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

from jax.sharding import AbstractMesh

from agentcpm_jax.mesh import AXES, MeshConfig, mesh_shape
from agentcpm_jax.model.config import QWEN3_0_6B, QWEN3_4B, ModelConfig
from agentcpm_jax.plan import flops, memory
from agentcpm_jax.plan.aot import compile_step, topology_devices
from agentcpm_jax.plan.slices import TOPOLOGIES, device_count
from agentcpm_jax.sharding import make_mesh
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.placement import (
    abstract_inputs,
    report_text,
    sharding_report,
    step_shardings,
)

GIB = 2**30
SLOW = 2  # how much slower the checking machine may be than the one the CPU limits are for
RESULTS = ROOT / "experiments" / "results"
# Logits from bfloat16 operands, summed in float32: products of float32 take a TPU six passes.
TRAINED = {"param_dtype": "float32", "remat": "full", "lm_head_fp32": False}
BIG = dataclasses.replace(QWEN3_4B, **TRAINED)
SMALL = dataclasses.replace(QWEN3_0_6B, **TRAINED)
ADAPTED = dataclasses.replace(QWEN3_4B, remat="full", lm_head_fp32=False, lora_rank=16)


def in_float32(model: ModelConfig) -> ModelConfig:
    """As a GPU without bfloat16 computes it; the parameters are stored as they were."""
    return dataclasses.replace(model, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Row:
    """One step to compile; limits are per device (GiB) and for the compiler (CPU s, GiB)."""

    kind: str  # sft | rl
    slice: str
    model: ModelConfig
    row_length: int
    rows: int
    mesh: MeshConfig
    expected: tuple[str, ...] = ()  # collectives that must be there
    hbm_limit: float = 0.0  # 0: what the device has
    cpu_limit: float = 240.0
    rss_limit: float = 3.0

    def inputs(self) -> tuple[Any, ...]:
        """(model, optimiser, mesh shape, rows, tokens of a row)."""
        shape = mesh_shape(self.mesh, device_count(self.slice))
        tx, _ = make_optimizer(OptimizerConfig(schedule="constant"))
        return self.model, tx, shape, self.rows, self.row_length


ROWS = {
    "rl-4b-128k-v5p-64": Row(
        "rl",
        "v5p-64",
        BIG,
        131_072,
        4,
        MeshConfig(fsdp=4, context=8),
        expected=("all-gather", "all-reduce"),
        hbm_limit=14.0,
    ),
    "sft-4b-4k-v6e-64": Row(
        "sft",
        "v6e-64",
        BIG,
        4096,
        64,
        MeshConfig(fsdp=16, tensor=4),
        expected=("all-gather", "all-reduce"),
        hbm_limit=7.5,
    ),
    "sft-4b-32k-v5p-32": Row("sft", "v5p-32", BIG, 32_768, 16, MeshConfig(), ("all-gather",)),
    "sft-4b-4k-v5p-32": Row("sft", "v5p-32", BIG, 4096, 16, MeshConfig(), ("all-gather",)),
    "lora-4b-4k-v5e-64": Row("sft", "v5e-64", ADAPTED, 4096, 64, MeshConfig(), ("all-gather",)),
    "sft-0.6b-4k-v5e-1": Row("sft", "v5e-1", SMALL, 4096, 2, MeshConfig()),
    "lora-4b-4k-v5e-1": Row("sft", "v5e-1", ADAPTED, 4096, 2, MeshConfig()),
    "sft-0.6b-1k-t4-1": Row("sft", "t4-1", in_float32(SMALL), 1024, 2, MeshConfig()),
    "lora-4b-1k-t4-1": Row("sft", "t4-1", in_float32(ADAPTED), 1024, 1, MeshConfig()),
}
CHECKED = ("rl-4b-128k-v5p-64", "sft-4b-4k-v6e-64")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="the rows of CI; fails on a limit")
    parser.add_argument("--rows", default="", help="names, comma-separated; default: all")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)  # the process of one row
    parser.add_argument("--report", action="store_true", help="print the sharding of every array")
    flags = parser.parse_args()
    if flags.row:
        print("RESULT " + json.dumps(examine(flags.row, flags.report)))
        return
    names = CHECKED if flags.check else tuple(filter(None, flags.rows.split(","))) or tuple(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        sys.exit(f"unknown row {unknown[0]!r}; use one of {', '.join(ROWS)}")
    found = []
    for name in names:
        found.append(in_process(name, flags.report))
        print(table(found[-1:]) if len(found) == 1 else table(found[-1:]).splitlines()[-1])
        if not flags.check and "error" not in found[-1]:
            write(found[-1])
    failures = {row["row"]: broken_limits(row) for row in found}
    for failure in (line for lines in failures.values() for line in lines):
        print(f"FAILED: {failure}")
    good = sum(not lines for lines in failures.values())
    print(f"AOT: {good} of {len(found)} rows within their limits")
    sys.exit(0 if good == len(found) else 1)


def examine(name: str, report: bool) -> dict[str, Any]:
    """Compiles one row in this process; for accelerators without a compiler here, estimates it."""
    row = ROWS[name]
    return analytic(name) | (compiled(row, report) if row.slice in TOPOLOGIES else {})


def analytic(name: str) -> dict[str, Any]:
    """What is known of a row without compiling it."""
    row = ROWS[name]
    model, tx, shape, *size = row.inputs()
    chip = flops.CHIPS[row.slice.split("-")[0]]
    useful = flops.train_flops(model, *size)
    devices = device_count(row.slice)
    guess = memory.estimate(model, tx, AbstractMesh(shape, AXES), *size)
    return {
        "row": name,
        "source": "AOT" if row.slice in TOPOLOGIES else "estimate",
        "kind": row.kind,
        "slice": row.slice,
        "model": dataclasses.asdict(model),
        "mesh": dict(zip(AXES, shape, strict=True)),
        "rows": row.rows,
        "row_length": row.row_length,
        "devices": devices,
        "device_gib": chip.hbm_bytes / GIB,
        "estimate_gib": guess.total / GIB,
        "model_flops": useful,
        "roofline_s": flops.roofline_seconds(model, *size, chip, devices),
        "half_mfu_s": flops.seconds(useful, model, chip, devices, 0.5),
    }


def compiled(row: Row, report: bool) -> dict[str, Any]:
    """The compiler's figures."""
    model, tx, _, *size = row.inputs()
    mesh = make_mesh(row.mesh, topology_devices(row.slice))
    if report:
        shardings = step_shardings(mesh, model, tx, row.rows)
        state, batch = abstract_inputs(model, tx, *size, shardings)
        print(report_text(sharding_report({"state": state, "batch": batch})), flush=True)
    start = time.perf_counter()
    loss = LossConfig() if row.kind == "rl" else None
    done = compile_step(model, tx, mesh, *size, loss=loss)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "hbm_gib": done.hbm_bytes / GIB,
        "argument_gib": done.argument_bytes / GIB,
        "temp_gib": done.temp_bytes / GIB,
        "collectives": done.collectives,
        "splash_calls": done.pallas_calls,
        "compile_wall_s": time.perf_counter() - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "rss_gib": usage.ru_maxrss / 2**20,
    }


def in_process(name: str, report: bool) -> dict[str, Any]:
    """`examine` in a process of its own."""
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
    held = found.get("hbm_gib", found["estimate_gib"])
    limits = [(held, row.hbm_limit or found["device_gib"], "GiB of HBM per device")]
    broken = []
    if found["source"] == "AOT":
        limits.append((found["cpu_s"], row.cpu_limit * SLOW, "CPU s to compile"))
        limits.append((found["rss_gib"], row.rss_limit, "GiB of memory to compile"))
        if not found["splash_calls"]:
            broken.append(f"{name}: no splash attention in the program")
        broken += [f"{name}: no {c}" for c in row.expected if not found["collectives"][c]]
    for value, limit, unit in limits:
        if value > limit:
            broken.append(f"{name}: {value:.2f} {unit}, at most {limit:.2f} allowed")
    return broken


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, a line per row."""
    titles = (
        "step",
        "mesh",
        "rows x tokens",
        "HBM GiB of",
        "source",
        "estimate",
        "arguments, temporaries",
        "collectives; Pallas calls",
        "model TFLOP",
        "roofline s",
        "s at 50 % MFU",
        "compile CPU s, GiB",
    )
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for r in found:
        cells = [r["row"], r["error"]] if "error" in r else _cells(r)
        lines.append("| " + " | ".join(cells + [""] * (len(titles) - len(cells))) + " |")
    return "\n".join(lines)


def _cells(r: dict[str, Any]) -> list[str]:
    mesh = ", ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1)
    held, parts, program, cost = r["estimate_gib"], "", "", ""
    if r["source"] == "AOT":
        held = r["hbm_gib"]
        parts = f"{r['argument_gib']:.2f}, {r['temp_gib']:.2f}"
        ops = ", ".join(f"{n} {c}" for c, n in r["collectives"].items() if n) or "none"
        program = f"{ops}; {r['splash_calls']}"
        cost = f"{r['cpu_s']:.0f}, {r['rss_gib']:.1f}"
    return [
        r["row"],
        mesh or "1 device",
        f"{r['rows']} x {r['row_length']:,}",
        f"{held:.2f} of {r['device_gib']:.2f}",
        r["source"],
        f"{r['estimate_gib']:.2f}",
        parts,
        program,
        f"{r['model_flops'] / 1e12:,.0f}",
        f"{r['roofline_s']:.2f}",
        f"{r['half_mfu_s']:.2f}",
        cost,
    ]


def write(found: dict[str, Any]) -> None:
    """One row into the table; the compiler's figures of the others stay, if of these versions."""
    versions = {name: version(name) for name in ("jax", "jaxlib", "libtpu", "optax")}
    about = {
        "command": "make aot-table",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no accelerator",
        "python": platform.python_version(),
        "versions": versions,
    }
    path = RESULTS / "aot.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    same = before.get("versions") == versions
    known = {r["row"]: r for r in before.get("rows", []) if same and r["row"] in ROWS}
    known[found["row"]] = found
    rows = [known[name] | analytic(name) for name in ROWS if name in known]
    path.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    note = f"`make aot-table`, Python {about['python']}, {listed}; nothing was run on a TPU.\n"
    (RESULTS / "aot.md").write_text(f"{note}\n{table(rows)}\n")


if __name__ == "__main__":
    main()
