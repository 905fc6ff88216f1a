"""One GPU against its own ceilings: SFT and RL steps at 4B in bfloat16, and decoding.

    python experiments/bench/gpu_h200.py            # an H200: about 15 minutes, 110 GB
    python experiments/bench/gpu_h200.py --only sft_8k,decode
    python experiments/bench/gpu_h200.py --tiny     # the same code on a CPU, written nowhere

First what the device can do: a large bfloat16 product, and a copy. Then seconds of whole optimizer
steps (cuDNN attention, full remat, AdamW) on rows of one segment, as share of the product's rate
(model FLOPs: see `plan/flops.py`); and a decoded token of a batch, as share of the copy's rate
(parameters and cache, read once). Every figure is the median of `ROUNDS` after one that compiles.
Writes experiments/results/gpu_h200.{json,md}; parts that were not measured keep their last result.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from agentcpm_jax.data.batch import Batch
from agentcpm_jax.model import params as model_params
from agentcpm_jax.model.attention.choice import choose, platform_of
from agentcpm_jax.model.config import QWEN3_4B, ModelConfig
from agentcpm_jax.model.decode import extend, init_cache
from agentcpm_jax.plan.flops import CHIPS, train_flops
from agentcpm_jax.train.config import OptimizerConfig
from agentcpm_jax.train.losses.config import LossConfig
from agentcpm_jax.train.optimizer import make_optimizer
from agentcpm_jax.train.step import Frozen, TrainState, make_rl_step, make_sft_step

OUT = ROOT / "experiments" / "results" / "gpu_h200"
ROUNDS = 5
#: name -> (kind, rows, row length); full remat keeps one residual per layer and token.
STEPS = {
    "sft_8k": ("sft", 4, 8192),
    "sft_32k": ("sft", 1, 32_768),
    "rl_8k": ("rl", 4, 8192),
    "rl_32k": ("rl", 1, 32_768),
}
#: (rows, tokens in the cache of each).
DECODE = ((1, 8192), (16, 8192), (64, 4096))
MODEL = replace(QWEN3_4B, remat="full", lm_head_fp32=False, logits_chunk=4096)
TINY = replace(
    ModelConfig(vocab_size=256, width=64, num_layers=2, ffw=128), remat="full", logits_chunk=64
)


def main(argv: list[str] | None = None) -> int:
    """Measures what was asked for."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--only", default=",".join(["ceilings", *STEPS, "decode"]))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, any device, no result")
    args = parser.parse_args(argv)
    if not args.tiny and platform_of(None) != "gpu":
        print("error: no GPU here; --tiny runs the same code on a CPU", file=sys.stderr)
        return 2
    model = TINY if args.tiny else MODEL
    scale = 64 if args.tiny else 1
    found: dict[str, Any] = {"ceilings": ceilings(model.dtype, 512 if args.tiny else 16_384)}
    for name in args.only.split(","):
        if name in STEPS:
            kind, rows, length = STEPS[name]
            found[name] = train(kind, model, rows, length // scale, found["ceilings"])
        elif name == "decode":
            for rows, filled in DECODE:
                result = decode(model, rows, filled // scale, found["ceilings"])
                found[f"decode_{rows}x{filled}"] = result
    for name, result in found.items():
        print(name, json.dumps(result), flush=True)
    if not args.tiny:
        write(found, " ".join(["python", "experiments/bench/gpu_h200.py", *sys.argv[1:]]))
    return 0


def ceilings(dtype: str, size: int) -> dict[str, float]:
    """What the device can do: FLOP/s of a product, bytes/s of a copy (read and written)."""
    x = jnp.ones((size, size), dtype)
    product, copy = jax.jit(jnp.matmul), jax.jit(lambda x: x + 1)
    flops = 2 * size**3 / median_seconds(lambda: product(x, x))
    many = jnp.ones((8 * size, size), dtype)
    moved = 2 * many.nbytes / median_seconds(lambda: copy(many))
    return {"matmul_flops": flops, "copy_bytes": moved}


def train(
    kind: str, model: ModelConfig, rows: int, length: int, top: dict[str, float]
) -> dict[str, Any]:
    """Seconds, tokens per second and MFU of an optimizer step."""
    tx, schedule = make_optimizer(OptimizerConfig(moments="bfloat16", schedule="constant"))
    params = jax.jit(model_params.init, static_argnums=1)(jax.random.key(0), model)
    state = TrainState.create(params, tx)
    del params
    batch = jax.device_put(one_segment_batch(model, rows, length))
    if kind == "sft":
        step: Any = make_sft_step(model, tx, schedule, micro_rows=1)
        rest: tuple[Any, ...] = (Frozen(),)
    else:
        step = make_rl_step(model, LossConfig(), tx, schedule, micro_rows=1)
        rest = (jnp.int32(0), Frozen())
    carried = [state]
    del state

    def once() -> Any:
        carried[0], metrics = step(carried[0], batch, *rest)
        return metrics["train/loss"]

    loss = float(once())
    seconds = median_seconds(once)
    flops = train_flops(model, rows, length)
    carried.clear()
    gc.collect()
    vendor = CHIPS["h200"].flops
    return {
        "rows": rows,
        "row_length": length,
        "attention": choose(model, platform_of(None)).name,
        "seconds": seconds,
        "tokens_per_second": rows * length / seconds,
        "mfu_of_measured_matmul": flops / seconds / top["matmul_flops"],
        "mfu_of_vendor_figure": flops / seconds / vendor,
        "loss_of_first_step": loss,
    }


def decode(model: ModelConfig, rows: int, filled: int, top: dict[str, float]) -> dict[str, Any]:
    """Seconds of one token for every row, and the share of the copy's rate that is read."""
    params = jax.jit(model_params.init, static_argnums=1)(jax.random.key(0), model)
    cache = init_cache(model, rows, filled + ROUNDS + 2)
    cache = replace(cache, lengths=jnp.full((rows,), filled, jnp.int32))
    step = jax.jit(extend, static_argnums=1, donate_argnums=2)
    tokens, counts = jnp.ones((rows, 1), jnp.int32), jnp.ones((rows,), jnp.int32)
    carried = [cache]
    read = model_params.count(model) * jnp.dtype(model.param_dtype).itemsize
    read += carried[0].k.nbytes + carried[0].v.nbytes
    del cache

    def once() -> Any:
        logits, carried[0] = step(params, model, carried[0], tokens, counts)
        return logits

    seconds = median_seconds(once)
    return {
        "rows": rows,
        "filled": filled,
        "seconds_per_token": seconds,
        "tokens_per_second": rows / seconds,
        "bandwidth_of_measured_copy": read / seconds / top["copy_bytes"],
        "bandwidth_of_vendor_figure": read / seconds / CHIPS["h200"].bandwidth,
    }


def one_segment_batch(model: ModelConfig, rows: int, length: int) -> Batch:
    """Every row one sequence, trained but for its first token."""
    rng = np.random.default_rng(0)
    batch = Batch.empty(rows, length)
    batch.tokens[:] = rng.integers(0, model.vocab_size, (rows, length))
    batch.positions[:] = np.arange(length)
    batch.segment_ids[:] = 1
    batch.loss_mask[:, 1:] = 1
    batch.weights[:] = 1
    batch.advantages[:, 1:] = rng.choice([-1.0, 1.0], (rows, 1))
    batch.behavior_logprobs[:, 1:] = -np.log(model.vocab_size)
    batch.versions[:] = 0
    count, sequences = np.float32(rows * (length - 1)), np.float32(rows)
    return replace(batch, num_tokens=count, num_sequences=sequences)


def median_seconds(work: Callable[[], Any]) -> float:
    """Of `ROUNDS` rounds, after one that compiles."""
    jax.block_until_ready(work())
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(work())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def write(found: dict[str, Any], command: str) -> None:
    """Merges into the JSON, and makes the table from it."""
    about = {
        "command": command,
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    table = OUT.with_suffix(".json")
    results = json.loads(table.read_text()) if table.exists() else {}
    results |= {name: value | {"measured": about} for name, value in found.items()}
    table.write_text(json.dumps(results, indent=1) + "\n")
    top = results["ceilings"]
    lines = [
        "# One GPU against its ceilings",
        "",
        f"`{command}` on {about['machine']}, jax {about['jax']}: a bfloat16 product reaches "
        f"{top['matmul_flops'] / 1e12:.0f} TFLOP/s, a copy {top['copy_bytes'] / 1e9:.0f} GB/s.",
        "",
        "| part | shape | seconds | tokens/s | of the ceiling | of the vendor's figure |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, part in results.items():
        if "seconds" in part:
            shape, kind = f"{part['rows']} x {part['row_length']}", "MFU"
            seconds = part["seconds"]
            ours, theirs = "mfu_of_measured_matmul", "mfu_of_vendor_figure"
        elif "seconds_per_token" in part:
            shape, kind = f"{part['rows']} x {part['filled']}", "bandwidth"
            seconds = part["seconds_per_token"]
            ours, theirs = "bandwidth_of_measured_copy", "bandwidth_of_vendor_figure"
        else:
            continue
        lines.append(
            f"| {name} ({kind}) | {shape} | {seconds:.4f} | {part['tokens_per_second']:,.0f} "
            f"| {part[ours]:.1%} | {part[theirs]:.1%} |"
        )
    OUT.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
