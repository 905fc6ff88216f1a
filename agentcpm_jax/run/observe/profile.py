"""Runs a few steps of a stage under JAX's profiler and writes a page on where their time went.

`<stage>/profile/` gets the trace (for Perfetto or TensorBoard) and `summary.md`: wall time by phase
of the step, the operations that took longest, and the fraction of the roofline that was reached.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from agentcpm_jax.files import write_atomically
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.plan.flops import CHIPS, Chip, roofline_seconds, train_flops
from agentcpm_jax.run.context import RunContext
from agentcpm_jax.run.multihost import is_main

#: Steps before the first that is traced (they compile), and how many are traced.
WARM, STEPS = 2, 3
TOP = 15
#: The phases after the computation of a step.
COMPUTED = ("reading the loss", "publishing the weights")

#: `Device.device_kind` contains the key -> name in `CHIPS`.
KINDS = {"v5p": "v5p", "v5 lite": "v5e", "v5e": "v5e", "v6": "v6e", "T4": "t4", "H200": "h200"}
KINDS |= {"TPU v5": "v5p"}


class Operation(NamedTuple):
    """An operation of compiled programs: its own seconds, without nested operations."""

    name: str
    count: int
    seconds: float


class Peak(NamedTuple):
    """Peak rates of the step's devices, and their source."""

    chip: Chip
    devices: int
    source: str


@contextmanager
def watched(
    ctx: RunContext, directory: Path, start: int, rows: int, row_length: int
) -> Iterator[Callable[[int, str], None]]:
    """Yields the function to call with (step, phase) as phases begin, for watchdog and profile.

    Args:
      directory: of the stage.
      start: steps that were complete before.
      rows, row_length: of a batch.
    """
    with ctx.watchdog.watching() as seen, _patient(ctx, start, seen) as watch:
        if not (ctx.cfg.profile and is_main()):
            yield watch
            return
        profile = Profile(directory / "profile", start + WARM + 1)

        def on_phase(step: int, phase: str) -> None:
            watch(step, phase)
            profile.on_phase(step, phase)

        try:
            yield on_phase
        finally:
            profile.stop()
        written = profile.write(ctx.cfg.model, rows, row_length)
        ctx.announce(written or f"no profile: the stage ended within {WARM} steps")


@contextmanager
def _patient(
    ctx: RunContext, start: int, watch: Callable[[int, str], None]
) -> Iterator[Callable[[int, str], None]]:
    """A signal waits for the step under way; not for the first one of a process, which compiles.

    Of several processes none may leave a step, since the others wait for it.
    """
    ctx.stop.patient = jax.process_count() > 1

    def on_phase(step: int, phase: str) -> None:
        ctx.stop.patient |= step > start + 1 or phase in COMPUTED
        watch(step, phase)

    try:
        yield on_phase
    finally:
        ctx.stop.patient = False


class Profile:
    """Traces `STEPS` steps from `first` on."""

    def __init__(self, directory: Path, first: int) -> None:
        self._directory, self._first = directory, first
        self._began: list[tuple[float, int, str]] = []
        self._tracing = False

    def on_phase(self, step: int, phase: str) -> None:
        """A phase of a step begins; the one before it has ended."""
        if step >= self._first + STEPS:
            self.stop()
        elif step >= self._first:
            if not self._tracing and not self._began:
                jax.profiler.start_trace(str(self._directory))
                self._tracing = True
            self._began.append((time.monotonic(), step, phase))

    def stop(self) -> None:
        """Ends the trace; the second call does nothing."""
        if self._tracing:
            self._began.append((time.monotonic(), -1, ""))
            jax.profiler.stop_trace()
            self._tracing = False

    def write(self, model: ModelConfig, rows: int, row_length: int) -> str:
        """Writes the page; returns a line about it, empty when nothing was traced."""
        if not self._began:
            return ""
        steps = len({step for _, step, _ in self._began} - {-1})
        page = self._directory / "summary.md"
        operations = read_trace(newest_trace(self._directory))
        text = summary(phases(self._began), operations, steps, model, rows, row_length, peak(model))
        write_atomically(page, text)
        return f"profile of {steps} steps: {page}"


def phases(began: Sequence[tuple[float, int, str]]) -> dict[str, float]:
    """Seconds by phase from (time, step, phase) of every beginning; the last one is the end."""
    found: dict[str, float] = defaultdict(float)
    for (start, _, phase), (stop, _, _) in itertools.pairwise(began):
        found[phase] += stop - start
    return dict(found)


def newest_trace(directory: Path) -> Path:
    """The trace that JAX's profiler wrote last below `directory`."""
    return max(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)


def read_trace(path: Path) -> list[Operation]:
    """Operations of compiled programs in a trace in Chrome's format, the longest first."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    threads = {
        (e["pid"], e.get("tid")): e["args"]["name"]
        for e in events
        if e.get("ph") == "M" and e.get("name") == "thread_name"
    }
    lines: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") != "X":
            continue
        line = event["pid"], event.get("tid")
        if "hlo_op" in event.get("args", {}) or threads.get(line) == "XLA Ops":
            lines[line].append(event)
    counts: dict[str, int] = defaultdict(int)
    own: dict[str, float] = defaultdict(float)
    for line in lines.values():
        for name, seconds in _own_times(line):
            counts[name] += 1
            own[name] += seconds
    ops = [Operation(name, counts[name], seconds) for name, seconds in own.items()]
    return sorted(ops, key=lambda op: (-op.seconds, op.name))


def _own_times(line: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """(name, seconds without those of events inside) of the events of one thread."""
    open_: list[list[Any]] = []  # [end, name, own microseconds]
    for event in sorted(line, key=lambda e: (e["ts"], -e["dur"])):
        while open_ and open_[-1][0] <= event["ts"]:
            _, name, own = open_.pop()
            yield name, own / 1e6
        if open_:
            open_[-1][2] -= event["dur"]
        open_.append([event["ts"] + event["dur"], event["name"], event["dur"]])
    for _, name, own in open_:
        yield name, own / 1e6


def peak(model: ModelConfig) -> Peak:
    """The vendor's figures for the devices, or the measured rate of large products."""
    device = jax.devices()[0]
    for part, name in KINDS.items():
        if part in device.device_kind:
            return Peak(CHIPS[name], jax.device_count(), f"{name}, the vendor's figure")
    size = 1024 if device.platform == "cpu" else 8192
    rates = {dtype: _product_rate(size, dtype) for dtype in {model.dtype, "float32"}}
    chip = Chip(rates[model.dtype], rates["float32"], math.nan, math.nan)
    # The devices of a CPU share its cores, and one product uses all of them.
    count = jax.process_count() if device.platform == "cpu" else jax.device_count()
    return Peak(chip, count, f"a product of {size} x {size} measured here")


def _product_rate(size: int, dtype: str) -> float:
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def summary(
    split: Mapping[str, float],
    operations: Sequence[Operation],
    steps: int,
    model: ModelConfig,
    rows: int,
    row_length: int,
    top: Peak,
) -> str:
    """The page, in Markdown."""
    step = sum(split.values()) / steps
    computed = split.get("train step", 0.0) / steps
    flops = train_flops(model, rows, row_length)
    roofline = roofline_seconds(model, rows, row_length, top.chip, top.devices)
    rate = top.chip.flops if model.dtype == "bfloat16" else top.chip.flops32
    rate *= top.devices
    busy = sum(op.seconds for op in operations) or math.nan
    return "\n".join(
        [
            f"# Profile of {steps} steps",
            "",
            f"{rows} rows of {row_length} tokens, {jax.device_count()} x "
            f"{jax.devices()[0].device_kind}, jax {jax.__version__}. Open the trace beside this "
            "page in ui.perfetto.dev.",
            "",
            "| | |",
            "|---|---|",
            f"| a step | {1e3 * step:.1f} ms, {rows * row_length / step:,.0f} tokens/s |",
            f"| model FLOPs of a step | {flops:.3e} |",
            f"| peak | {rate:.3e} FLOP/s in {model.dtype} ({top.source}) |",
            f"| MFU of the train step | {flops / computed / rate:.1%} |",
            f"| roofline of the train step | {1e3 * roofline:.2f} ms |",
            f"| fraction of the roofline | {roofline / computed:.1%} |",
            "",
            "## Where a step's time goes",
            "",
            "| phase | ms | share |",
            "|---|---|---|",
            *(
                f"| {phase} | {1e3 * seconds / steps:.2f} | {seconds / steps / step:.1%} |"
                for phase, seconds in split.items()
            ),
            "",
            f"## The {min(TOP, len(operations))} longest operations of {len(operations)}",
            "",
            "Time of their own, summed over the threads and devices of this process.",
            "",
            "| operation | times a step | ms a step | share |",
            "|---|---|---|---|",
            *(
                f"| `{op.name}` | {op.count / steps:.1f} | {1e3 * op.seconds / steps:.3f} "
                f"| {op.seconds / busy:.1%} |"
                for op in operations[:TOP]
            ),
            "",
        ]
    )
