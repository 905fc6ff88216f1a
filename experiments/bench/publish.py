"""Publishing weights against copying the same bytes: seconds, and memory that is not the disk's.

    python experiments/bench/publish.py                       # 0.6B in bfloat16, 1.2 GB
    python experiments/bench/publish.py --shape=4b            # 8 GB on the disk and in memory

Parameters of the model's shapes lie on the (CPU) device; both write to the same disk, in turns, and
wait until the disk has it (fsync); the first turn only warms up, as memory that a virtual machine
touches for the first time costs more than the work. Memory: the largest growth of anonymous pages
(RssAnon) while it writes. `page cache`: the same without the wait for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp

from agentcpm_jax import tree
from agentcpm_jax.model.config import ModelConfig
from agentcpm_jax.model.params import param_specs
from agentcpm_jax.weights.publish import publish_version
from agentcpm_jax.weights.store import version_folder

OUT = ROOT / "experiments" / "results" / "publish"
SHAPES = {
    "0.6b": ModelConfig(
        vocab_size=151936, width=1024, num_layers=28, num_heads=16, num_kv_heads=8, head_dim=128,
        ffw=3072, dtype="bfloat16", param_dtype="bfloat16",
    ),
    "4b": ModelConfig(
        vocab_size=151936, width=2560, num_layers=36, num_heads=32, num_kv_heads=8, head_dim=128,
        ffw=9728, dtype="bfloat16", param_dtype="bfloat16",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--workdir", default="", help="on the disk to measure")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        workdir = Path(args.workdir)
        print(json.dumps(turns(args.part, SHAPES[args.shape], workdir, args.turns + 1)))
        return
    rows: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory(dir=args.workdir or None) as workdir:
        for kind in ("", ", page cache"):
            for turn in child(kind or "disk", args.shape, workdir, args.turns)[1:]:
                for what, measured in turn.items():
                    rows.setdefault(what + kind, []).append(measured)
    write(args.shape, rows)


def child(part: str, shape: str, workdir: str, count: int) -> list[dict]:
    command = [sys.executable, __file__, f"--part={part}", f"--shape={shape}", f"--turns={count}"]
    done = subprocess.run([*command, f"--workdir={workdir}"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def turns(part: str, cfg: ModelConfig, workdir: Path, count: int) -> list[dict]:
    """[{publish, copy}] of one process; a copy takes the files of the publication before it."""
    if part != "disk":
        os.fsync = lambda number: None
    source, target = workdir / "published", workdir / "copied"
    params = zeros(cfg)
    found = []
    for _ in range(count):
        for old in (source, target):
            shutil.rmtree(old, ignore_errors=True)
        published = measured(lambda: publish_version(source, 0, params, cfg), source)
        files = [p for p in (source / version_folder(0)).iterdir() if p.stat().st_size]
        copied = measured(lambda files=files: copy(files, target), target)
        found.append({"publish": published, "copy": copied})
    for old in (source, target):
        shutil.rmtree(old, ignore_errors=True)
    return found


def copy(files: list[Path], target: Path) -> None:
    target.mkdir()
    for path in files:
        shutil.copyfile(path, target / path.name)
        with (target / path.name).open("rb") as file:
            os.fsync(file.fileno())


def measured(work: Callable[[], Any], where: Path) -> dict:
    os.sync()
    with Memory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    size = sum(p.stat().st_size for p in where.rglob("*") if p.is_file())
    return {"seconds": seconds, "cpu": cpu, "bytes": size, "grown": memory.grown}


def zeros(cfg: ModelConfig):
    """Parameters that differ from each other; what they are does not matter to a copy."""
    flat = tree.flatten(param_specs(cfg))
    dtype = jnp.dtype(cfg.param_dtype)
    made = {p: jnp.full(s.shape, i / 64, dtype) for i, (p, s) in enumerate(flat.items())}
    return jax.block_until_ready(tree.unflatten(made))


class Memory:
    """Largest growth of this process's anonymous memory (bytes), looked at every 5 ms."""

    def __enter__(self) -> Memory:
        self._first, self.grown, self._over = anonymous(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.grown = max(self.grown, anonymous() - self._first)


def anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


def ratio(rows: dict[str, list[dict]], kind: str) -> float:
    """Median over the turns."""
    pairs = zip(rows[f"publish{kind}"], rows[f"copy{kind}"], strict=True)
    return statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in pairs)


def write(shape: str, rows: dict[str, list[dict]]) -> None:
    """The table; results of other shapes stay in it."""
    grown = max(r["grown"] for part, found in rows.items() for r in found if "publish" in part)
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "jax": version("jax"),
        "turns": rows,
        "ratio": ratio(rows, ""),
        "ratio_page_cache": ratio(rows, ", page cache"),
        "grown_bytes": grown,
    }
    path = OUT.with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    found[shape] = result
    OUT.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    lines = ["# Publishing weights against copying the same bytes", ""]
    lines += ["`python experiments/bench/publish.py [--shape=4b]`; medians of the turns.", ""]
    lines += ["| shape | bytes | what | s | CPU-s | GB/s | largest growth of memory |"]
    lines += ["| --- | ---: | --- | ---: | ---: | ---: | ---: |"]
    for name, one in found.items():
        for part, turns in one["turns"].items():
            r = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            rate, memory = r["bytes"] / r["seconds"] / 1e9, max(turn["grown"] for turn in turns)
            lines.append(
                f"| {name} | {r['bytes'] / 1e9:.2f} GB | {part} | {r['seconds']:.2f} "
                f"| {r['cpu']:.2f} | {rate:.2f} | {memory / 2**20:.0f} MiB |"
            )
    for name, one in found.items():
        lines += [
            "",
            f"{name}: publish / copy = {one['ratio']:.2f} (page cache "
            f"{one['ratio_page_cache']:.2f}); {one['machine']}, jax {one['jax']}.",
        ]
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
