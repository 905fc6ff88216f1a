"""One CPU core: our train step, forward pass and loading against other JAX and torch stacks.

    python experiments/bench/train_step.py                             # ours alone, random weights
    python experiments/bench/train_step.py --peers DIR --names tunix,jaxllm,hf

DIR is a harness of peer scripts: `peer_NAME.py --workload W --serve` prints {"ready": true}, makes
one step for every line "go" and prints {"dt", "cpu"}, and its results after "stop";
$BENCH_PY_NAME is its interpreter, $BENCH_DATA holds the checkpoints that all load (`tiny_f32`,
`small_f32`, `small_bf16`). Steps of ours and of the peers take turns; ratios are of CPU seconds,
per round, and void unless the check values agree.

    train_tiny_f32   forward, backward, AdamW on 4 x 512 tokens; width 256, 4 layers, 4096 ids
    fwd_small_f32    logits of 256 tokens; the dimensions of Qwen3-0.6B
    load_small_bf16  safetensors to ready parameters; Qwen3-0.6B
    grpo_tiny_f32    4 prompts x 4 samples, 64 + 64 tokens at temperature 1, one update of all
                     parameters (ours: MiniRL); samples differ, so no check value

Writes experiments/results/train_step.{json,md}. Set BENCH_CPUS=1 to stay on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if os.environ.get("BENCH_CPUS"):
    os.sched_setaffinity(0, {int(cpu) for cpu in os.environ["BENCH_CPUS"].split(",")})
os.environ["JAX_PLATFORMS"] = "cpu"
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "experiments" / "results"

#: Every workload: checkpoint, rows, tokens a row, rounds, whether all peers fit in memory together.
WORKLOADS = {
    "train_tiny_f32": ("tiny_f32", 4, 512, 7, True),
    "fwd_small_f32": ("small_f32", 1, 256, 5, False),
    "load_small_bf16": ("small_bf16", 0, 0, 9, True),
    "grpo_tiny_f32": ("tiny_f32", 16, 128, 5, True),
}
SIZES = {  # width, layers, query heads, key heads, head dim, ffw
    "tiny": (256, 4, 8, 4, 32, 768),
    "small": (1024, 28, 16, 8, 128, 3072),
}
VOCABULARY = {"tiny": 4096, "small": 151_936}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=os.environ.get("BENCH_PEERS", ""), help="the harness")
    parser.add_argument("--names", default="tunix,jaxllm,hf")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=0, help="instead of each workload's own")
    parser.add_argument("--save", action="store_true", help="write experiments/results")
    parser.add_argument("--ours", default="", help=argparse.SUPPRESS)  # a process that is measured
    args = parser.parse_args()
    if args.ours:
        serve(args.ours)
        return
    names = ["ours", *(args.names.split(",") if args.peers else [])]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("BENCH_DATA", scratch)
        found = [
            compare(workload, names, Path(args.peers), args.rounds)
            for workload in args.workloads.split(",")
        ]
    print(table(found))
    if args.save:
        save(found)


def compare(workload: str, names: list[str], peers: Path, rounds: int) -> dict[str, Any]:
    """Every stack on one workload: results by name, and paired ratios of CPU seconds to ours."""
    *_, own_rounds, together = WORKLOADS[workload]
    rounds = rounds or own_rounds
    steps: dict[str, list[dict[str, float]]] = {}
    results: dict[str, Any] = {}
    groups = [names] if together else [[name] for name in names]
    for group in groups:
        live = {}
        for name in group:
            process = start(workload, name, peers)
            if read(process) is None:
                results[name] = {"failed": process.wait()}
                continue
            live[name], steps[name] = process, []
        for i in range(rounds):
            order = list(live)[i % len(live) :] + list(live)[: i % len(live)] if live else []
            for name in order:
                print("go", file=live[name].stdin, flush=True)
                steps[name].append(read(live[name]) or {})
        for name, process in live.items():
            print("stop", file=process.stdin, flush=True)
            results[name] = read(process) | {"cpu": [step["cpu"] for step in steps[name]]}
            if name == "ours":
                results[name]["matmul"] = [step["matmul"] for step in steps[name]]
            process.wait()
    for result in results.values():
        if "cpu" in result:
            pairs = zip(results["ours"]["cpu"], result["cpu"], strict=False)
            result["speed_of_ours"] = statistics.median(theirs / ours for ours, theirs in pairs)
    return {"workload": workload, "results": results}


def start(workload: str, name: str, peers: Path) -> subprocess.Popen[str]:
    if name == "ours":
        command = [sys.executable, __file__, f"--ours={workload}"]
    else:
        python = os.environ.get(f"BENCH_PY_{name.upper()}", sys.executable)
        script = str(peers / f"peer_{name}.py")
        command = [python, script, "--workload", workload, "--serve", "--warmup", "2"]
    pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere, text=True)


def read(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return None


def serve(workload: str) -> None:
    """Our side of the protocol: two steps to warm up, then one for each "go"."""
    steps = {"train": train_steps, "fwd": forward_steps, "load": load_steps, "grpo": rl_steps}
    run = steps[workload.split("_")[0]](workload)
    began = time.perf_counter()
    check = next(run)
    next(run)
    print(json.dumps({"ready": True}), flush=True)
    warm_up = time.perf_counter() - began
    for line in sys.stdin:
        if line.strip() != "go":
            break
        wall, cpu = time.perf_counter(), time.process_time()
        next(run)
        done = {"dt": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        # Beside each step, as the machine's speed changes with what else runs on it.
        print(json.dumps(done | {"matmul": matmul_rate()}), flush=True)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"peak_rss_mb": rss, "check": check, "compile_s": warm_up}), flush=True)


def train_steps(workload: str) -> Iterator[float]:
    """Each `next` is one optimizer step; the loss before it."""
    import jax
    import numpy as np

    from agentcpm_jax.data.pack import fill
    from agentcpm_jax.data.rows import text_row
    from agentcpm_jax.train.config import OptimizerConfig
    from agentcpm_jax.train.optimizer import make_optimizer
    from agentcpm_jax.train.step import Frozen, TrainState, make_sft_step

    params, cfg = load(workload, np.float32)
    optimizer = OptimizerConfig(lr=1e-5, weight_decay=0.0, clip_norm=0.0, schedule="constant")
    tx, schedule = make_optimizer(optimizer)
    step = make_sft_step(cfg, tx, schedule)
    state = TrainState.create(params, tx)
    tokens = token_ids(workload)
    rows = fill([[text_row(r)] for r in tokens], tokens.shape[1], len(tokens))
    batch = jax.tree.map(jax.numpy.asarray, rows)
    while True:
        state, metrics = jax.block_until_ready(step(state, batch, Frozen()))
        yield float(metrics["train/loss"])


def forward_steps(workload: str) -> Iterator[float]:
    """Each `next` is a forward pass; the mean absolute logit."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from agentcpm_jax.model.qwen3 import forward

    params, cfg = load(workload, np.float32)
    tokens = jnp.asarray(token_ids(workload))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(lambda *inputs: forward(inputs[0], cfg, *inputs[1:]))
    check = None
    while True:
        logits = jax.block_until_ready(run(params, tokens, positions, jnp.ones_like(tokens)))
        check = float(jnp.abs(logits).mean()) if check is None else check
        del logits
        yield check


def load_steps(workload: str) -> Iterator[float]:
    """Each `next` is one loading; the sum of the parameters' maxima, by layer."""
    import jax
    import jax.numpy as jnp

    params, check = None, None
    while True:
        del params
        params, _ = load(workload, None)
        jax.block_until_ready(params)
        if check is None:
            top = jax.jit(lambda x: jnp.abs(x).max())  # exact in any dtype, without a copy
            layered = [one for leaf in jax.tree.leaves(params["layers"]) for one in leaf]
            rest = jax.tree.leaves({**params, "layers": {}})
            check = float(sum(top(x).astype(jnp.float32) for x in [*layered, *rest]))
            del layered, rest
        yield check


def rl_steps(workload: str) -> Iterator[float]:
    """Each `next` samples 16 completions, steps on them and hands the weights to the engine."""
    import asyncio
    from types import SimpleNamespace

    import jax
    import jax.numpy as jnp
    import numpy as np

    from agentcpm_jax.data.pack import fill
    from agentcpm_jax.data.rows import rows_from_segment
    from agentcpm_jax.engine.config import EngineConfig
    from agentcpm_jax.engine.local import LocalEngine
    from agentcpm_jax.rollout.policy import SampleRequest, SamplingParams
    from agentcpm_jax.train.config import OptimizerConfig
    from agentcpm_jax.train.losses.config import LossConfig
    from agentcpm_jax.train.optimizer import make_optimizer
    from agentcpm_jax.train.step import Frozen, TrainState, make_rl_step
    from agentcpm_jax.types import Provenance, Segment

    params, cfg = load(workload, np.float32)
    engine = LocalEngine(params, cfg, EngineConfig(16, 128, 64, (), (64,), (64,)))
    optimizer = OptimizerConfig(lr=1e-6, weight_decay=0.0, clip_norm=0.0, schedule="constant")
    tx, schedule = make_optimizer(optimizer)
    step = make_rl_step(cfg, LossConfig(name="minirl"), tx, schedule)
    state = TrainState.create(params, tx)
    prompts = token_ids(workload)[::4, :64].repeat(4, axis=0)
    source = np.array([Provenance.TEMPLATE] * 64 + [Provenance.SAMPLED] * 64, np.uint8)

    async def sample(version: int) -> list[Any]:
        asked = [
            SampleRequest(f"{i}/", ids, 64, SamplingParams(temperature=1.0, seed=(version, i)))
            for i, ids in enumerate(prompts)
        ]
        return await asyncio.gather(*map(engine.sample, asked))

    for version in itertools.count():
        rows = []
        for i, done in enumerate(asyncio.run(sample(version))):
            logprobs = np.concatenate([np.full(64, np.nan, np.float32), done.logprobs])
            versions = np.concatenate([np.full(64, -1, np.int32), done.versions])
            segment = Segment(np.append(prompts[i], done.ids), source, logprobs, versions)
            score = np.full(128, float(i % 4) - 1.5, np.float32)
            credit = SimpleNamespace(advantage=score, keep=np.ones(128, bool))
            rows.append(rows_from_segment(segment, credit))
        batch = jax.tree.map(jnp.asarray, fill(rows, 128, 16))
        state, metrics = jax.block_until_ready(step(state, batch, jnp.int32(version), Frozen()))
        engine.set_params(state.params, version + 1)
        yield float(metrics["train/loss"])


def load(workload: str, dtype: Any) -> tuple[Any, Any]:
    """(params, cfg) of the workload's checkpoint."""
    from agentcpm_jax.hf.load import load_hf

    name = WORKLOADS[workload][0]
    directory = Path(os.environ["BENCH_DATA"]) / name
    if not directory.exists():
        make_checkpoint(directory)
    params, cfg = load_hf(directory, param_dtype=None if dtype is None else "float32")
    return params, dataclasses.replace(cfg, dtype=cfg.param_dtype)


def make_checkpoint(directory: Path) -> None:
    """Random weights, written by a process of its own: they are not part of anyone's peak."""
    import jax

    from agentcpm_jax.hf.save import save_hf
    from agentcpm_jax.model import params as model_params
    from agentcpm_jax.model.config import ModelConfig

    size, dtype = directory.name.split("_")
    if os.environ.get("BENCH_MAKES") != directory.name:
        workload = next(w for w in WORKLOADS if WORKLOADS[w][0] == directory.name)
        again = [sys.executable, __file__, f"--ours={workload}"]
        env = os.environ | {"BENCH_MAKES": directory.name}
        subprocess.run(again, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        return
    stored = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    cfg = ModelConfig(VOCABULARY[size], *SIZES[size], max_positions=4096, param_dtype=stored)
    save_hf(directory, model_params.init(jax.random.key(0), cfg), cfg)
    sys.exit()


def token_ids(workload: str) -> Any:
    """The ids that all stacks see."""
    import numpy as np

    name, rows, length, *_ = WORKLOADS[workload]
    vocabulary = VOCABULARY[name.split("_")[0]]
    return np.random.default_rng(0).integers(4, vocabulary, (rows, length)).astype(np.int32)


def model_flops(workload: str) -> float:
    """Products with weights and causal attention, forward (x 3 with the backward pass)."""
    name, rows, length, *_ = WORKLOADS[workload]
    size = name.split("_")[0]
    width, layers, heads, kv_heads, head_dim, ffw = SIZES[size]
    weights = layers * width * (2 * head_dim * (heads + kv_heads) + 3 * ffw)
    weights += VOCABULARY[size] * width
    scores = layers * heads * head_dim * length  # causal: half of all
    forward = 2.0 * (weights + scores) * rows * length
    return forward * (3 if workload.startswith("train") else 1)


def matmul_rate() -> float:
    """FLOP per CPU second of a 2048^3 float32 product."""
    import jax.numpy as jnp

    a = jnp.ones((2048, 2048))
    product = _product()
    product(a).block_until_ready()
    start = time.process_time()
    product(a).block_until_ready()
    return 2 * 2048**3 / (time.process_time() - start)


@functools.cache
def _product() -> Callable[..., Any]:
    import jax

    return jax.jit(lambda a: a @ a)


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| workload | stack | CPU s min / median / max | of the matmul limit | ours is faster by "
        "| peak RSS MB | first steps s | check |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        rates = one["results"]["ours"]["matmul"]
        flops = model_flops(one["workload"])
        for name, r in one["results"].items():
            if "cpu" not in r:
                lines.append(f"| {one['workload']} | {name} | failed ({r}) |" + " |" * 5)
                continue
            cpu = sorted(r["cpu"])
            median = statistics.median(cpu)
            shares = [flops / c / rate for c, rate in zip(r["cpu"], rates, strict=False)]
            counted = one["workload"][:5] in ("train", "fwd_s")
            share = f"{statistics.median(shares):.2f}" if counted else "-"
            ratio = "-" if name == "ours" else f"{r['speed_of_ours']:.2f} x"
            lines.append(
                f"| {one['workload']} | {name} | {cpu[0]:.3g} / {median:.3g} / {cpu[-1]:.3g} | "
                f"{share} | {ratio} | {r['peak_rss_mb']:.0f} | {r['compile_s']:.1f} | "
                f"{'-' if r['check'] is None else format(r['check'], '.6g')} |"
            )
    return "\n".join(lines)


def save(found: list[dict[str, Any]]) -> None:
    import jax

    about = {
        "command": " ".join(
            ["python", "experiments/bench/train_step.py", *map(shown, sys.argv[1:])]
        ),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs of it used",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(about | {"found": found}, indent=1)
    (RESULTS / "train_step.json").write_text(text + "\n")
    note = (
        f"`{about['command']}`, Python {about['python']}, jax {about['jax']}, {about['machine']}. "
        "The matmul limit is measured after each of our steps.\n"
    )
    (RESULTS / "train_step.md").write_text(f"{note}\n{table(found)}\n")


def shown(argument: str) -> str:
    """Without folders of this machine."""
    return Path(argument).name if argument.startswith("/") else argument


if __name__ == "__main__":
    main()
