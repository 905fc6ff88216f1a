"""What the experience log costs: bytes, CPU, commits a minute.

    python experiments/bench/experience_log.py            # about a minute on two quiet cores

Two threads record finished trajectories of 8,000 tokens into a new SQLite log (WAL,
synchronous=NORMAL), as fast as they can, compression included. Writes
experiments/results/experience_log.{json,md}; exits 1 when a figure is missed.

Data: token ids drawn independently from a Zipf-Mandelbrot law over 151,643 ids (real text repeats
itself and is smaller), a random order of ids within each power of two of the rank, as in a merged
vocabulary; log-probabilities -exp(N(-4, 3)) in float32 with all mantissa bits random (the worst
case: log-softmax values of an engine have fewer); 40 turns, each an observation, then sampled
tokens, one tool call and its result; one weight update in the middle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from agentcpm_jax.log.codec import decode_trajectory, encode_trajectory
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.types import (
    Provenance,
    Segment,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    Turn,
    Verdict,
)

VOCABULARY, TOKENS, GROUP = 151_643, 8_000, 8
RESULTS = ROOT / "experiments" / "results"


def main() -> int:
    """Measure, write the table, say whether the figures hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trajectories", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    figures = {f"bytes_per_token_{name}": size(share) for name, share in SHARES.items()}
    figures["hundred_segments_over_one"] = hundred_turns()
    figures |= codec_seconds()
    with tempfile.TemporaryDirectory(dir=ROOT / "experiments") as scratch:
        figures |= record(Path(scratch) / "experience.db", args.trajectories, args.threads)
    claims = {
        "at least 10,000 trajectories a minute": figures["trajectories_per_minute"] >= 10_000,
        "p99 of recording a trajectory at most 50 ms": figures["record_p99_ms"] <= 50,
        "at most 6 bytes per unique token, all sampled": figures["bytes_per_token_all"] <= 6,
        "100 segments at most 1.1 times one": figures["hundred_segments_over_one"] <= 1.1,
    }
    write(figures, claims, args)
    return 0 if all(claims.values()) else 1


SHARES = {"third": 1 / 3, "all": 1.0}


def trajectory(seed: int, share: float, turns: int = 40) -> Trajectory:
    """One segment of `TOKENS` tokens, `share` of them sampled."""
    rng = np.random.default_rng(seed)
    ids = _LAW.draw(rng, TOKENS)
    provenance = np.full(TOKENS, Provenance.TOOL, np.uint8)
    step, spans = TOKENS // turns, []
    for t in range(turns):
        start, end = t * step, (t + 1) * step
        middle = end - round(step * share)
        provenance[middle:end] = Provenance.SAMPLED
        call = ToolCall("search", {"query": f"query {rng.integers(1e6)}"}, span=(middle, end))
        result = ToolResult(ToolStatus.OK, "", round(float(rng.exponential()), 4))
        spans.append(Turn(0, start, middle, end, (call,), (result,)))
    sampled = provenance == Provenance.SAMPLED
    logprob = np.where(sampled, -np.exp(rng.normal(-4, 3, TOKENS)), np.nan).astype(np.float32)
    version = np.where(np.arange(TOKENS) < TOKENS // 2, 17, 18)
    segment = Segment(ids, provenance, logprob, np.where(sampled, version, -1).astype(np.int32))
    return Trajectory(
        (segment,), tuple(spans), StopReason.ANSWERED, verdict=Verdict.RIGHT, reward=1.0
    )


class _Law:
    """Zipf-Mandelbrot ranks to ids."""

    def __init__(self) -> None:
        weights = 1.0 / (np.arange(1, VOCABULARY + 1) + 2.7) ** 1.07
        self._cumulative = np.cumsum(weights / weights.sum())
        rng, order = np.random.default_rng(0), np.arange(VOCABULARY, dtype=np.int32)
        for k in range(18):
            rng.shuffle(order[2**k : 2 ** (k + 1)])
        self._order = order

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        ranks = np.searchsorted(self._cumulative, rng.random(count))
        return self._order[np.minimum(ranks, VOCABULARY - 1)]


_LAW = _Law()


def size(share: float) -> float:
    """Bytes per unique token of whole blobs, turns and scalars included."""
    blobs = [encode_trajectory(trajectory(seed, share)) for seed in range(16)]
    return sum(map(len, blobs)) / (16 * TOKENS)


def hundred_turns() -> float:
    """A segment per turn that extends the last one, its samples re-shown as history: size ratio."""
    whole = trajectory(0, 1 / 3, turns=100)
    (one,) = whole.segments
    segments: list[Segment] = []
    for index, turn in enumerate(whole.turns):
        now = Segment(*(a[: turn.end] for a in (one.ids, one.provenance, one.logprob, one.version)))
        shown, old = turn.start, now.sampled & (np.arange(turn.end) < turn.start)
        segments.append(
            Segment(
                now.ids,
                np.where(old, np.uint8(Provenance.HISTORY), now.provenance),
                np.where(old, np.float32(np.nan), now.logprob),
                np.where(old, np.int32(-1), now.version),
                parent_segment=index - 1,
                shared_prefix_len=shown,
                edit_reason="rendered_again" if index else "",
            )
        )
    forked = replace(whole, segments=tuple(segments))
    blob = encode_trajectory(forked)
    back = decode_trajectory(blob)
    for a, b in zip(forked.segments, back.segments, strict=True):
        assert all(
            getattr(a, n).tobytes() == getattr(b, n).tobytes()
            for n in ("ids", "provenance", "logprob", "version")
        )
    return len(blob) / len(encode_trajectory(whole))


def codec_seconds() -> dict[str, float]:
    """CPU milliseconds per trajectory, a third of it sampled."""
    found = [trajectory(seed, 1 / 3) for seed in range(32)]
    began = time.process_time()
    blobs = [encode_trajectory(t) for t in found]
    middle = time.process_time()
    for blob in blobs:
        decode_trajectory(blob)
    end = time.process_time()
    return {
        "encode_cpu_ms": (middle - began) * 1e3 / 32,
        "decode_cpu_ms": (end - middle) * 1e3 / 32,
    }


def record(path: Path, count: int, threads: int) -> dict[str, float]:
    """Groups of 8 trajectories, a third of their tokens sampled, recorded and settled."""
    ready = [trajectory(seed, 1 / 3) for seed in range(32)]
    seconds: list[list[float]] = [[] for _ in range(threads)]
    with ExperienceLog.open(path) as log:
        ids = log.issue_round(
            "rl", "train", [(Task(f"q{n}", ("a",)), 0, n) for n in range(count // GROUP)]
        )

        def work(k: int) -> None:
            for issue_id in ids[k::threads]:
                for sample in range(GROUP):
                    made = ready[(issue_id * GROUP + sample) % len(ready)]
                    began = time.perf_counter()
                    log.record_trajectory(replace(made, issue_id=issue_id, sample=sample))
                    seconds[k].append(time.perf_counter() - began)
                log.finish_group(issue_id, "ready")

        workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
        wall, cpu = time.perf_counter(), time.process_time()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done = len(ids) * GROUP
    each = np.sort(np.concatenate(seconds)) * 1e3
    return {
        "trajectories": done,
        "trajectories_per_minute": 60 * done / wall,
        "trajectories_per_minute_by_cpu_time_on_2_cores": 2 * 60 * done / cpu,
        "record_cpu_ms": cpu * 1e3 / done,
        "record_p50_ms": float(np.quantile(each, 0.5)),
        "record_p99_ms": float(np.quantile(each, 0.99)),
        "record_max_ms": float(each[-1]),
        "file_bytes_per_token": path.stat().st_size / (done * TOKENS),
    }


def write(figures: dict[str, float], claims: dict[str, bool], args: Any) -> None:
    """experiments/results/experience_log.{json,md}."""
    machine = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[1], 2),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "numpy": np.__version__,
    }
    command = "python experiments/bench/experience_log.py"
    content = {"command": command, "threads": args.threads, "machine": machine}
    content |= {"figures": figures, "claims": claims}
    lines = [
        "# Experience log: size and speed",
        "",
        f"`{command}`",
        "",
        str(__doc__).split("Data: ")[1],
    ]
    lines += ["| figure | measured |", "|---|---|"]
    lines += [f"| {name} | {value:,.2f} |" for name, value in figures.items()]
    lines += ["", "| claim | holds |", "|---|---|"]
    lines += [f"| {name} | {'yes' if held else 'no'} |" for name, held in claims.items()]
    lines += ["", f"Machine: {machine}"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "experience_log.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "experience_log.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
