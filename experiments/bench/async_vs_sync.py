"""Asynchronous against synchronous RL under long-tail tool latencies: who keeps the machine busy?

    python experiments/bench/async_vs_sync.py           # about 8 minutes on two quiet cores
    python experiments/bench/async_vs_sync.py --quick   # one scale, few steps, about 2 minutes

The tiny agent after SFT plays in the offline world; real decoding, real train steps, the real
stream and experience log, all in one process on the same cores. Every tool call is made to take a
log-normal time (sigma 1), drawn from (issue, sample, attempt, call): both modes and all scales see
the same draws, multiplied by the scale. Only eta differs: 0 is synchronous, 4 the default.

Busy is the wall time in which an executable of the trainer or of the engine runs, from its call to
its result being ready: the union of both, over the time from one batch to another late in the run.
Host work (templates, parsing, packing, the log) between executables is not busy. The scale at which
the synchronous trainer is 45 % busy is found from its idle time; the row that hit it
is the row that is compared.

Writes experiments/results/async_vs_sync.{json,md} and two charts; exits 1 when a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp

from agentcpm_jax.data.pack import pack
from agentcpm_jax.data.rows import shipped_rows
from agentcpm_jax.engine import local
from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.evaluate.report.charts import line_chart
from agentcpm_jax.files import SHIPPED
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.hf.tokenizer import load_chat
from agentcpm_jax.log.experience import ExperienceLog
from agentcpm_jax.model.config import TINY
from agentcpm_jax.rewards.advantages import AdvantageConfig
from agentcpm_jax.rewards.denoise import DenoiseConfig
from agentcpm_jax.rollout.config import EpisodeConfig, StreamConfig
from agentcpm_jax.rollout.staleness import oldest_trained
from agentcpm_jax.rollout.stream import Stream
from agentcpm_jax.run.observe.meter import rss_mib
from agentcpm_jax.run.sampling import make_finish, make_run_sample
from agentcpm_jax.tasks.world import WorldTasks
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.step import Frozen, TrainState, make_rl_step
from agentcpm_jax.world.search import search_index
from agentcpm_jax.world.tools import LocalPages, WorldToolbox, config_of
from agentcpm_jax.world.vocabulary import SYSTEM_PROMPT
from configs.tiny import CONTEXT, VOCABULARY

RESULTS = ROOT / "experiments" / "results"
GROUPS, SAMPLES = 4, 4  # of a batch: 16 episodes
ROW_LENGTH, ROWS, MICRO_ROWS = CONTEXT, 16, 4  # one compiled shape; passes as needed
ETA = 4
TARGET, TOLERANCE = 0.45, 0.02
ENGINE = EngineConfig(slots=80, capacity=CONTEXT, row_buckets=(8, 24), token_buckets=(64,))
EPISODE = EpisodeConfig(
    system_prompt=SYSTEM_PROMPT, max_turns=12, max_context=CONTEXT, max_new_tokens=32, reserve=8
)
TASKS = WorldTasks("train", worlds=40, per_world=16)


def main() -> int:
    """Find the scale, measure both modes over scales, write the table and the charts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one scale, few steps")
    args = parser.parse_args()
    lengths = Lengths(4, 8) if args.quick else Lengths(14, 40)
    bench = Bench()
    bench.warm_up()
    at = find_scale(bench, lengths, TARGET, TOLERANCE / 2, tries=2 if args.quick else 6)
    pairs = [(at, bench.run(ETA, at.latency, lengths))]
    if not args.quick:
        deep = find_scale(bench, lengths, 0.33, TOLERANCE, tries=3, first=2 * at.latency)
        for sync in (deep, *(bench.run(0, at.latency * k, lengths) for k in (0.0, 0.25, 0.5))):
            pairs.append((sync, bench.run(ETA, sync.latency, lengths)))
    claims = {
        f"synchronous {100 * TARGET:.0f} +- {100 * TOLERANCE:.0f} % busy": (
            abs(pairs[0][0].busy - TARGET) <= TOLERANCE
        ),
        "asynchronous at least 93 % busy": pairs[0][1].busy >= 0.93,
        "at least 1.9 times the samples per second": speed_up(*pairs[0]) >= 1.9,
        "no shipped sample older than eta": all(r.oldest <= r.eta for p in pairs for r in p),
        "nothing compiled while measuring": not any(r.compilations for p in pairs for r in p),
    }
    write(pairs, claims)
    return 0 if all(claims.values()) else 1


@dataclass(frozen=True)
class Lengths:
    """Measured steps of a run of either mode."""

    sync: int
    asynchronous: int


@dataclass(frozen=True)
class Row:
    """One run. Shares are of the wall time of the measured steps; memory in MiB."""

    eta: int
    latency: float  # seconds, median of a tool call
    steps: int
    seconds: float
    busy: float  # trainer or engine
    trainer_busy: float
    engine_busy: float
    both_busy: float
    cpu: float  # CPU seconds per second, of the whole process
    samples_per_second: float
    tokens_per_second: float  # trained
    tokens_per_sample: float  # trained
    oldest: int  # age of the oldest shipped sample, in versions
    dropped: int  # groups dropped as over-age, whole run
    rss_mean: float
    rss_max: float
    compilations: int


def speed_up(sync: Row, asynchronous: Row) -> float:
    """Samples per second over samples per second."""
    return asynchronous.samples_per_second / sync.samples_per_second


def find_scale(
    bench: Bench, lengths: Lengths, target: float, tolerance: float, tries: int, first: float = 0.15
) -> Row:
    """The synchronous run whose busy share is `target`; the nearest one after `tries`.

    The idle time of a step is nearly proportional to the scale (all of it is waiting for tools),
    its busy time nearly constant: so busy = 1 / (1 + k scale), and each run gives an estimate of k;
    their median is used, because on a machine that others use they scatter.
    """
    latency, best, estimates = first, None, []
    for _ in range(tries):
        row = bench.run(0, latency, lengths)
        if best is None or abs(row.busy - target) < abs(best.busy - target):
            best = row
        if abs(row.busy - target) <= tolerance:
            break
        estimates.append((1 / row.busy - 1) / latency)
        latency = (1 / target - 1) / statistics.median(estimates)
    assert best is not None
    return best


class Busy:
    """When executables ran: (who, start, end) of each call, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[tuple[str, float, float]] = []

    def timed(self, who: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, waiting for its result and noting how long it took."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            out = jax.block_until_ready(call(*args, **kwargs))
            with self._lock:
                self._spans.append((who, start, time.perf_counter()))
            return out

        return timed

    def seconds(self, begin: float, end: float, *who: str) -> float:
        """Time within [begin, end] in which at least one executable of `who` ran."""
        with self._lock:
            mine = sorted((s, e) for w, s, e in self._spans if w in who)
        total, reached = 0.0, begin
        for start, stop in mine:
            start, stop = max(start, reached), min(stop, end)
            total += max(0.0, stop - start)
            reached = max(reached, stop)
        return total


class Bench:
    """The agent, its compiled programs and the stopwatches; `run` is one run of either mode."""

    def __init__(self) -> None:
        self.model = replace(TINY, vocab_size=VOCABULARY)
        where = SHIPPED["shipped:sft"]
        self.params, _ = load_hf(where, param_dtype=self.model.param_dtype)
        self.chat = load_chat(where)
        self.busy, self.compilations = Busy(), 0
        optimizer = OptimizerConfig(lr=1e-5, schedule="constant")
        self.tx, schedule = make_optimizer(optimizer)
        step = make_rl_step(
            self.model, LossConfig(name="minirl"), self.tx, schedule, micro_rows=MICRO_ROWS
        )
        self.step = self.busy.timed("trainer", step)
        # The engine finds its two programs under these names.
        local.prefill = self.busy.timed("engine", local.prefill)  # type: ignore[assignment]
        local.decode = self.busy.timed("engine", local.decode)  # type: ignore[assignment]
        jax.monitoring.register_event_duration_secs_listener(self._compiled)

    def warm_up(self) -> None:
        """Compiles every shape of trainer and engine, makes every world."""
        for ordinal in range(len(TASKS)):
            TASKS.task_at(ordinal)
        self.run(ETA, 0.0, Lengths(1, 1))
        self.run(0, 0.05, Lengths(1, 1))

    def run(self, eta: int, latency: float, lengths: Lengths) -> Row:
        """A fresh log, engine and optimiser; the first steps fill the pipeline and do not count."""
        first, steps = (8, lengths.asynchronous) if eta else (2, lengths.sync)
        with tempfile.TemporaryDirectory() as scratch:
            engine = LocalEngine(self.params, self.model, ENGINE)
            with ExperienceLog.open(Path(scratch) / "experience.db") as log:
                try:
                    with self._stream(log, engine, eta, latency) as stream:
                        row = self._train(stream, engine, eta, latency, first, steps)
                finally:
                    engine.close()
        say(row)
        return row

    def _train(
        self, stream: Stream, engine: LocalEngine, eta: int, latency: float, first: int, steps: int
    ) -> Row:
        """What `run.loop.train` does, without checkpoints and metrics."""
        state, ages, tokens, samples, memory = self._state(), [], 0, 0, []
        begin = cpu = compiled = 0.0
        stream.start()
        for version in range(first + steps):
            if version == first:
                begin, cpu, compiled = time.perf_counter(), time.process_time(), self.compilations
            shipped = stream.next_step_segments(version)
            rows = shipped_rows(shipped)
            batch = pack(rows, ROW_LENGTH, row_multiple=ROWS, micro_rows=MICRO_ROWS).batch
            state, _ = self.step(state, batch, jnp.int32(version), Frozen())
            engine.set_params(state.params, version + 1)
            stream.set_version(version + 1)
            oldest = (oldest_trained(s.segment, s.credit.keep) for s in shipped)
            ages += [version - v for v in oldest if v is not None]
            if version >= first:
                samples += len({(s.issue_id, s.sample) for s in shipped})
                tokens += int(batch.num_tokens)
                memory.append(rss_mib())
        end = time.perf_counter()
        wall, figures = end - begin, stream.snapshot()
        share = {
            name: self.busy.seconds(begin, end, *who) / wall
            for name, who in {
                "busy": ("trainer", "engine"),
                "trainer_busy": ("trainer",),
                "engine_busy": ("engine",),
            }.items()
        }
        return Row(
            eta=eta,
            latency=latency,
            steps=steps,
            seconds=wall,
            **share,
            both_busy=share["trainer_busy"] + share["engine_busy"] - share["busy"],
            cpu=(time.process_time() - cpu) / wall,
            samples_per_second=samples / wall,
            tokens_per_second=tokens / wall,
            tokens_per_sample=tokens / samples,
            oldest=max(ages),
            dropped=int(figures.get("stream/dropped/over_age", 0)),
            rss_mean=sum(memory) / len(memory),
            rss_max=max(memory),
            compilations=int(self.compilations - compiled),
        )

    def _stream(self, log: ExperienceLog, engine: LocalEngine, eta: int, latency: float) -> Stream:
        async def open_toolbox(task_meta: Mapping[str, Any], key: tuple[int, ...]) -> WorldToolbox:
            world = config_of(task_meta)
            pages = LocalPages(search_index(world))
            return WorldToolbox(pages, replace(world, tool_latency=latency), key)

        cfg = StreamConfig(
            batch_groups=GROUPS,
            group_size=SAMPLES,
            max_staleness=eta,
            max_concurrent_groups=(ETA + 1) * GROUPS,
        )
        # Groups without signal are kept: their refill would only add noise to the comparison.
        finish = make_finish(DenoiseConfig(("environment",)), AdvantageConfig(drop_zero=False))
        run_sample = make_run_sample(engine, self.chat, EPISODE, open_toolbox, seed=0)
        return Stream(log, "rl", lambda n: TASKS.task_at(n % len(TASKS)), run_sample, finish, cfg)

    def _state(self) -> TrainState:
        return TrainState.create(jax.tree.map(jnp.copy, self.params), self.tx)

    def _compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.compilations += event.endswith("backend_compile_duration")


def say(row: Row) -> None:
    print(
        f"eta {row.eta}  latency {row.latency:.3f} s  busy {row.busy:.1%} (trainer "
        f"{row.trainer_busy:.1%}, engine {row.engine_busy:.1%})  {row.samples_per_second:.2f} "
        f"samples/s  {row.seconds:.0f} s  compiled {row.compilations}",
        flush=True,
    )


def write(pairs: Sequence[tuple[Row, Row]], claims: Mapping[str, bool]) -> None:
    """JSON, table and charts below experiments/results."""
    content = {
        "command": " ".join(["python experiments/bench/async_vs_sync.py", *sys.argv[1:]]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "engine": asdict(ENGINE),
        "holds": dict(claims),
        "runs": [
            {"sync": asdict(a), "async": asdict(b), "speed_up": speed_up(a, b)} for a, b in pairs
        ],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "async_vs_sync.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "async_vs_sync.md").write_text(table(pairs, claims, content))
    ordered = sorted(pairs, key=lambda pair: pair[0].latency)
    charts = {
        "busy": ("busy", 100.0, "busy, % of wall time"),
        "rate": ("samples_per_second", 1.0, "samples per second"),
    }
    for name, (field, factor, title) in charts.items():
        lines = {
            label: [(pair[i].latency, factor * getattr(pair[i], field)) for pair in ordered]
            for i, label in enumerate(("synchronous", f"eta = {ETA}"))
        }
        chart = line_chart(lines, title, "median tool latency, s", smooth=False, width=420)
        (RESULTS / f"async_vs_sync_{name}.svg").write_text(chart)


def table(
    pairs: Sequence[tuple[Row, Row]], claims: Mapping[str, bool], content: Mapping[str, Any]
) -> str:
    lines = [
        "# Asynchronous against synchronous RL",
        "",
        f"`{content['command']}` on {content['machine']}, jax {jax.__version__}. Batches of "
        f"{GROUPS} groups of {SAMPLES}; tool latencies log-normal, sigma 1; shares are of wall "
        "time, of the trainer's and the engine's executables.",
        "",
        *(f"- {claim}: {'held' if holds else 'MISSED'}" for claim, holds in claims.items()),
        "",
        "| median latency, s | eta | busy | trainer | engine | both at once | samples/s | times "
        "sync | trained tokens/sample | oldest age | over-age groups | RSS mean / max, MiB |",
        "| ---: " * 12 + "|",
    ]
    for pair in sorted(pairs, key=lambda pair: pair[0].latency):
        lines += [
            f"| {r.latency:.3f} | {r.eta} | {r.busy:.1%} | {r.trainer_busy:.1%} | "
            f"{r.engine_busy:.1%} | {r.both_busy:.1%} | {r.samples_per_second:.2f} | "
            f"{speed_up(pair[0], r):.2f} | {r.tokens_per_sample:.1f} | {r.oldest} | {r.dropped} | "
            f"{r.rss_mean:.0f} / {r.rss_max:.0f} |"
            for r in pair
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
