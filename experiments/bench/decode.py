"""The JAX engine on one CPU core: greedy decoding, ragged batches, episodes, the memory limit.

    BENCH_CPUS=1 python experiments/bench/decode.py                  # this engine alone
    BENCH_CPUS=1 BENCH_DATA=D python experiments/bench/decode.py --peers DIR --python PY  # tunix
    BENCH_CPUS=1 python experiments/bench/decode.py --only large     # 0.6B dimensions, ~6 GB

`--peers` holds `peer_tunix.py`, which runs a step for each line on its standard input and answers
with a line of JSON, {"dt": seconds, "cpu": seconds}; `BENCH_DATA` holds the checkpoint `tiny_f32`
that both load. Steps of both alternate. Figures are CPU seconds on the core that BENCH_CPUS names.
Writes experiments/results/decode.{json,md}, where parts that were not measured keep their last
result; exits 1 for a missed limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

if os.environ.get("BENCH_CPUS"):  # before jax counts the cores
    os.sched_setaffinity(0, {int(cpu) for cpu in os.environ["BENCH_CPUS"].split(",")})
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import asyncio
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.engine.config import EngineConfig
from agentcpm_jax.engine.local import LocalEngine
from agentcpm_jax.hf.load import load_hf
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.config import QWEN3_0_6B, ModelConfig
from agentcpm_jax.rollout.policy import Completion, SampleRequest, SamplingParams

OUT = ROOT / "experiments" / "results" / "decode"
TINY = ModelConfig(
    vocab_size=4096, width=256, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=32, ffw=768
)
PROMPT, NEW, RESERVED = 32, 64, 4
LIMITS = {"b1": 0.95, "b8": 1.0, "b32": 1.0, "ragged": 2.0, "episodes": 3.0}


def main() -> int:
    """Measure what was asked for; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=os.environ.get("BENCH_PEERS", ""))
    parser.add_argument("--python", default=os.environ.get("BENCH_PY_TUNIX", sys.executable))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="b1,b8,b32,ragged,episodes")
    args = parser.parse_args()
    params, cfg = tiny_model(args.peers)
    found: dict[str, Any] = {}
    for name in args.only.split(","):
        if name in ("b1", "b8", "b32"):
            found[name] = greedy(params, cfg, int(name[1:]), args)
        elif name == "large":
            found[name] = large()
        else:
            found[name] = {"ragged": ragged, "episodes": episodes}[name](params, cfg)
        print(name, json.dumps(found[name]), flush=True)
    write(found)
    missed = [k for k, v in found.items() if "ratio" in v and v["ratio"] < LIMITS[k]]
    print("missed: " + ", ".join(missed) if missed else "all limits hold")
    return 1 if missed else 0


def tiny_model(peers: str) -> tuple[dict, ModelConfig]:
    """The peers' checkpoint, or the same shapes at random."""
    if peers:
        return load_hf(Path(os.environ["BENCH_DATA"]) / "tiny_f32")
    return model_params.init(jax.random.key(0), TINY), TINY


# --- greedy decoding beside a peer ------------------------------------------------------------


def greedy(params: dict, cfg: ModelConfig, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """`batch` prompts of 32 tokens, 64 new ones each; the same ids as the peer."""
    prompts = np.random.default_rng(0).integers(RESERVED, cfg.vocab_size, (batch, PROMPT))
    engine = LocalEngine(
        params,
        cfg,
        EngineConfig(
            slots=batch,
            capacity=128,
            chunk=NEW,
            row_buckets=(),
            token_buckets=(PROMPT,),
            length_buckets=(PROMPT,),
        ),
        reuse=False,  # a step may not profit from the one before
    )
    requests = [request(i, prompt, NEW) for i, prompt in enumerate(prompts)]

    def step() -> list[Completion]:
        return run(engine, requests)

    done = step()
    step()
    check = int(done[0].ids[:8].sum())
    peer = Peer(args, f"decode_tiny_f32_b{batch}") if args.peers else None
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(args.rounds):
        for mine in (True, False) if turn % 2 else (False, True):
            if mine:
                ours.append(cpu_seconds(step))
            elif peer is not None:
                theirs.append(peer.step())
    engine.close()
    found: dict[str, Any] = {
        "cpu_s": statistics.median(ours),
        "tokens_per_cpu_s": batch * NEW / statistics.median(ours),
        "check": check,
    }
    if peer is not None:
        last = peer.finish()
        assert last["check"] == check, f"other ids: {check}, the peer {last['check']}"
        ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
        found |= {"peer": "tunix", "peer_cpu_s": statistics.median(theirs)}
        found |= {"ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
        found["peer_versions"] = last["versions"]
    return found


class Peer:
    """A peer's program that runs a step when it is told to."""

    def __init__(self, args: argparse.Namespace, workload: str) -> None:
        script = Path(args.peers) / "peer_tunix.py"
        self._process = subprocess.Popen(
            [args.python, str(script), "--workload", workload, "--serve", "--warmup", "2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        assert self._read().get("ready"), "the peer did not start"

    def step(self) -> float:
        """CPU seconds of one step."""
        self._tell("go")
        return self._read()["cpu"]

    def finish(self) -> dict[str, Any]:
        self._tell("stop")
        last = self._read()
        self._process.wait()
        return last

    def _tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the peer ended with {self._process.wait()}")


# --- what the engine adds ---------------------------------------------------------------------


def ragged(params: dict, cfg: ModelConfig) -> dict[str, Any]:
    """64 requests with log-normal lengths (sigma 1, mean 64) in 8 slots: a request takes the slot
    of one that has ended, and steps shrink to the rows that are left; against batches of 8 that
    run as such until their longest ends. Three draws of lengths, twice; the ratio is of sums."""
    shape = EngineConfig(
        slots=8,
        capacity=1024,
        chunk=16,
        row_buckets=(1, 2, 4),
        token_buckets=(PROMPT,),
        length_buckets=(128, 256, 512),
    )
    engine = LocalEngine(params, cfg, shape, reuse=False)
    static = LocalEngine(params, cfg, replace(shape, row_buckets=()), reuse=False)

    def in_batches(requests: list[SampleRequest]) -> list[Completion]:
        return [c for i in range(0, 64, 8) for c in run(static, requests[i : i + 8])]

    draws = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        lengths = np.maximum(rng.lognormal(np.log(64) - 0.5, 1.0, 64).astype(int), 1)
        prompts = rng.integers(RESERVED, cfg.vocab_size, (64, PROMPT))
        draws.append([request(i, prompts[i], int(n)) for i, n in enumerate(lengths)])
    for requests in draws:  # each shape is compiled once
        assert same_ids(run(engine, requests), in_batches(requests))
    pairs = [
        (cpu_seconds(lambda r=r: run(engine, r)), cpu_seconds(lambda r=r: in_batches(r)))
        for _ in range(2)
        for r in draws
    ]
    engine.close()
    static.close()
    ours, theirs = (sum(times) for times in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    found = {"cpu_s": ours, "cpu_s_without": theirs, "ratio": theirs / ours}
    return found | {"least": ratios[0], "most": ratios[-1]}


def episodes(params: dict, cfg: ModelConfig) -> dict[str, Any]:
    """An episode of 32 turns, 48 new tokens of observation and 16 sampled each: keys and values of
    earlier turns kept, against every turn fed from the start."""
    rng = np.random.default_rng(0)
    seen = rng.integers(RESERVED, cfg.vocab_size, (32, 48)).astype(np.int32)
    shape = EngineConfig(
        slots=2,
        capacity=2304,
        chunk=16,
        row_buckets=(1,),
        token_buckets=(64, 256),
        length_buckets=(256, 768, 1536),
    )
    engines = [LocalEngine(params, cfg, shape, reuse=keep) for keep in (True, False)]

    def play(engine: LocalEngine) -> list[Completion]:
        text, done = np.zeros(0, np.int32), []
        engine.flush()
        for turn, observation in enumerate(seen):
            text = np.concatenate([text, observation])
            done += run(engine, [request(turn, text, 16)])
            text = np.concatenate([text, done[-1].ids])
        return done

    kept, fresh = (lambda e=engine: play(e) for engine in engines)
    assert same_ids(kept(), fresh())
    found = alternate(kept, fresh, 2)
    found["prompt_tokens_fed"] = [engine.tokens_prefilled // 3 for engine in engines]
    for engine in engines:
        engine.close()
    return found


def large() -> dict[str, Any]:
    """Qwen3-0.6B's dimensions in float32, one sequence: bytes of weights a second, against a
    product of a matrix of 512 MB with a vector."""
    cfg = replace(QWEN3_0_6B, dtype="float32", param_dtype="float32")
    limit = bandwidth()
    is_spec = lambda x: isinstance(x, model_params.ParamSpec)  # noqa: E731
    specs = jax.tree.map(lambda s: s.shape, model_params.param_specs(cfg), is_leaf=is_spec)
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.standard_normal(shape, np.float32) * 0.02  # noqa: E731
    params = jax.tree.map(draw, specs, is_leaf=lambda x: isinstance(x, tuple))
    count = sum(x.size for x in jax.tree.leaves(params))
    shape = EngineConfig(
        slots=1,
        capacity=128,
        chunk=16,
        row_buckets=(),
        token_buckets=(PROMPT,),
        length_buckets=(PROMPT,),
    )
    engine = LocalEngine(params, cfg, shape)
    del params
    gc.collect()
    prompt = rng.integers(RESERVED, cfg.vocab_size, PROMPT)
    short, long = ([request(0, prompt, new)] for new in (1, 17))
    run(engine, long)  # its prompt stays in the cache
    seconds = [
        (cpu_seconds(lambda: run(engine, long)) - cpu_seconds(lambda: run(engine, short))) / 16
        for _ in range(5)
    ]
    engine.close()
    token = statistics.median(seconds)
    share = 4 * count / token / limit
    return {"cpu_s_per_token": token, "limit_gb_s": limit / 1e9, "share_of_limit": share}


def bandwidth() -> float:
    """Bytes a second of a float32 matrix-vector product, best of 5."""
    matrix, vector = jnp.ones((8192, 16384)), jnp.ones(16384)
    product = jax.jit(lambda m, v: m @ v)
    step = lambda: jax.block_until_ready(product(matrix, vector))  # noqa: E731
    step()
    return matrix.nbytes / min(cpu_seconds(step) for _ in range(5))


# --- small parts ------------------------------------------------------------------------------


def request(number: int, prompt: np.ndarray, new: int) -> SampleRequest:
    ids = np.asarray(prompt, np.int32)
    return SampleRequest(f"{number}/", ids, new, SamplingParams(temperature=0.0))


def run(engine: LocalEngine, requests: Sequence[SampleRequest]) -> list[Completion]:
    async def together() -> list[Completion]:
        return list(await asyncio.gather(*(engine.sample(r) for r in requests)))

    done = asyncio.run(together())
    assert all(not c.error for c in done), done[0].error
    return done


def same_ids(a: Sequence[Completion], b: Sequence[Completion]) -> bool:
    return all((x.ids == y.ids).all() for x, y in zip(a, b, strict=True))


def cpu_seconds(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def alternate(fast: Callable, slow: Callable, rounds: int) -> dict[str, Any]:
    """Medians of both, and of the ratio slow / fast of neighbours."""
    pairs = [(cpu_seconds(fast), cpu_seconds(slow)) for _ in range(rounds)]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "cpu_s": statistics.median(a for a, _ in pairs),
        "cpu_s_without": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "least": ratios[0],
        "most": ratios[-1],
    }


def write(found: dict[str, Any]) -> None:
    """Merge into decode.json, and decode.md from it."""
    about = {
        "command": " ".join(["python", *map(_shown, sys.argv)]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, BENCH_CPUS="
        + os.environ.get("BENCH_CPUS", "unset"),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    table = OUT.with_suffix(".json")
    results = json.loads(table.read_text()) if table.exists() else {}
    results |= {name: value | {"measured": about} for name, value in found.items()}
    table.write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        "# The JAX engine on one CPU core",
        "",
        "`python experiments/bench/decode.py` (CPU seconds, float32). Each part's own command and "
        "versions are in decode.json.",
        "",
        "| part | CPU s | of the other | ratio (least, most) | limit |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, limit in LIMITS.items():
        if name in results:
            lines.append(_row(name, results[name], limit))
    if "large" in results:
        part = results["large"]
        lines += [
            "",
            f"0.6B dimensions, batch 1: {part['cpu_s_per_token']:.3f} CPU-s a token, "
            f"{part['share_of_limit']:.2f} of the memory limit ({part['limit_gb_s']:.1f} GB/s, a "
            "matrix-vector product in the same process); the aim is 0.55.",
        ]
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n")


_NAMES = {
    **{f"b{rows}": f"greedy, batch {rows}, beside tunix" for rows in (1, 8, 32)},
    "ragged": "ragged batches, beside no continuous batching",
    "episodes": "32 turns, beside no prefix reuse",
}


def _row(name: str, part: dict[str, Any], limit: float) -> str:
    other = part.get("peer_cpu_s", part.get("cpu_s_without"))
    if other is None:
        return f"| {_NAMES[name]} | {part['cpu_s']:.3f} | not measured | | {limit} |"
    spread = f"{part['ratio']:.2f} ({part['least']:.2f}, {part['most']:.2f})"
    return f"| {_NAMES[name]} | {part['cpu_s']:.3f} | {other:.3f} | {spread} | {limit} |"


def _shown(argument: str) -> str:
    """Without folders of this machine."""
    return Path(argument).name if argument.startswith("/") else argument


if __name__ == "__main__":
    sys.exit(main())
