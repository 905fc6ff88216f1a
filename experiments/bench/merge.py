"""Cost of merging checkpoints, against copying the same bytes.

    python experiments/bench/merge.py --workdir=/tmp/merge                      # Qwen3-0.6B shapes
    python experiments/bench/merge.py --workdir=/tmp/merge --shape=quarter --repeats=1
    python experiments/bench/merge.py --workdir=/data/merge --shape=4b --repeats=1   # 32 GB of disk

A base and two fine-tunes of random bfloat16 weights. Each merge runs as its users run it, in a
process of its own, right after a copy that reads the three inputs and writes one of them, all in a
warm page cache. CPU seconds (user + system) net of `--help`, which imports the same; anonymous
memory is RssAnon, sampled.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from agentcpm_jax.hf.files import TensorInfo, plan_files, write_files

SHAPES = {  # hidden, layers, heads, kv heads, head size, feed-forward, vocabulary
    "tiny": (64, 2, 4, 2, 16, 64, 512),
    "quarter": (1024, 7, 16, 8, 128, 3072, 32768),
    "0.6b": (1024, 28, 16, 8, 128, 3072, 151936),
    "4b": (2560, 36, 32, 8, 128, 9728, 151936),
}
TUNED = "parameters: {{weight: 0.5{more}}}"
RECIPES = {
    "linear": (False, ""),
    "task_arithmetic": (True, ""),
    "ties": (True, ", density: 0.5"),
    "della": (True, ", density: 0.5, epsilon: 0.1"),
}
LIMITS = {"linear": 6.0, "ties": 15.0, "della": 30.0}
MEMORY_LIMIT = {"0.6b": 1.5, "4b": 2.5}  # GiB
BLOCK = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="for inputs and outputs")
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--methods", default="linear,ties,della")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=ROOT / "experiments" / "results")
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    inputs = make_inputs(args.workdir, args.shape)
    files = [path / "model.safetensors" for path in inputs]
    imports = statistics.median(merge(["--help"])[0] for _ in range(3))
    rows = []
    for method in args.methods.split(","):
        recipe = write_recipe(args.workdir, method, inputs)
        runs = []
        for _ in range(args.repeats):
            copied = copy(files, args.workdir / "copy.bin")
            out = args.workdir / "out"
            shutil.rmtree(out, ignore_errors=True)
            cpu, wall, peak = merge([str(recipe), str(out)])
            runs.append((cpu, wall, peak, *copied))
            print(
                f"{method}: {cpu:.2f} CPU s, copy {copied[0]:.2f}, {peak / 2**30:.2f} GiB",
                flush=True,
            )
        rows.append(summary(method, runs, imports))
    shutil.rmtree(args.workdir / "out", ignore_errors=True)
    (args.workdir / "copy.bin").unlink(missing_ok=True)
    write_results(args, rows, imports, 4 * files[0].stat().st_size)


def make_inputs(workdir: Path, shape: str) -> list[Path]:
    """Directories of a base and two fine-tunes; kept for the next time."""
    tensors = {name: TensorInfo(s, "bfloat16") for name, s in shapes(SHAPES[shape])}
    (layout,) = plan_files(tensors, 1 << 62)
    out = []
    for k, name in enumerate(("base", "tuned1", "tuned2")):
        directory = workdir / shape / name
        out.append(directory)
        if (directory / "config.json").is_file():
            continue
        directory.mkdir(parents=True, exist_ok=True)

        def values(tensor: str, k: int = k) -> Iterator[np.ndarray]:
            rows = tensors[tensor].shape[0]
            number = layout.tensors.index(next(t for t in layout.tensors if t[0] == tensor))
            for first in range(0, rows, 4096):
                part = (min(4096, rows - first), *tensors[tensor].shape[1:])
                rng = np.random.default_rng([0, number, first])
                x = rng.standard_normal(part, np.float32) * np.float32(0.02)
                if k:
                    own = np.random.default_rng([k, number, first])
                    x += own.standard_normal(part, np.float32) * np.float32(0.002)
                yield x.astype(ml_dtypes.bfloat16)

        write_files(directory, [layout], values)
        (directory / "config.json").write_text(json.dumps(config(SHAPES[shape])))
    return out


def shapes(sizes: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Qwen3 model with tied embeddings."""
    d, layers, n, k, h, f, v = sizes
    yield "model.embed_tokens.weight", (v, d)
    yield "model.norm.weight", (d,)
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, shape in {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
            "self_attn.q_proj": (n * h, d),
            "self_attn.k_proj": (k * h, d),
            "self_attn.v_proj": (k * h, d),
            "self_attn.o_proj": (d, n * h),
            "self_attn.q_norm": (h,),
            "self_attn.k_norm": (h,),
        }.items():
            yield f"{p}{name}.weight", shape


def config(sizes: tuple[int, ...]) -> dict[str, object]:
    """config.json of those shapes."""
    d, layers, n, k, h, f, v = sizes
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": n,
        "num_key_value_heads": k,
        "head_dim": h,
        "intermediate_size": f,
        "vocab_size": v,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def write_recipe(workdir: Path, method: str, inputs: list[Path]) -> Path:
    """A YAML file for the base and both fine-tunes."""
    base, *tuned = (path.absolute() for path in inputs)
    with_base, more = RECIPES[method]
    lines = [f"merge_method: {method}", "dtype: bfloat16"]
    lines += [f"base_model: {base}"] if with_base else []
    lines += ["models:"]
    for model in tuned if with_base else [base, *tuned]:
        lines += [f"- model: {model}", f"  {TUNED.format(more=more)}"]
    path = workdir / f"{method}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def copy(files: list[Path], out: Path) -> tuple[float, float]:
    """(CPU, wall) seconds of reading all files and writing the first; warms the cache as well."""
    buffer = bytearray(BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    wall, cpu = time.perf_counter(), time.process_time()
    for i, path in enumerate(files):
        with (
            path.open("rb", buffering=0) as f,
            out.open("wb" if i == 0 else "ab", buffering=0) as o,
        ):
            while count := f.readinto(buffer):
                if i == 0:
                    o.write(memoryview(buffer)[:count])
    return time.process_time() - cpu, time.perf_counter() - wall


def merge(arguments: list[str]) -> tuple[float, float, int]:
    """(CPU seconds, wall seconds, peak anonymous bytes) of one run of the launcher."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "merge.py"), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=env,
    )
    peak, stop = [0], threading.Event()
    sampler = threading.Thread(target=_sample, args=(process.pid, peak, stop))
    sampler.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    stop.set()
    sampler.join()
    if status:
        raise SystemExit(errors.decode())
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start, peak[0]


def _sample(pid: int, peak: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.02):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        if "RssAnon:" in status:
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)


def summary(method: str, runs: list[tuple[float, ...]], imports: float) -> dict[str, float | str]:
    """Medians over the runs; ratios are taken within each pair first."""
    return {
        "method": method,
        "cpu_seconds": statistics.median(r[0] for r in runs),
        "wall_seconds": statistics.median(r[1] for r in runs),
        "copy_cpu_seconds": statistics.median(r[3] for r in runs),
        "copy_wall_seconds": statistics.median(r[4] for r in runs),
        "cpu_ratio": statistics.median((r[0] - imports) / r[3] for r in runs),
        "wall_ratio": statistics.median(r[1] / r[4] for r in runs),
        "peak_anonymous_gib": max(r[2] for r in runs) / 2**30,
        "runs": len(runs),
    }


def write_results(
    args: argparse.Namespace, rows: list[dict[str, float | str]], imports: float, moved: int
) -> None:
    """merge.json and merge.md; the sizes other than 0.6b under a name of their own."""
    name = "merge" if args.shape == "0.6b" else f"merge_{args.shape}"
    about = {
        "command": " ".join(["python", "experiments/bench/merge.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "shape": args.shape,
        "gigabytes_moved": round(moved / 1e9, 3),
        "import_cpu_seconds": round(imports, 3),
    }
    args.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "rows": rows}, indent=2) + "\n"
    (args.results / f"{name}.json").write_text(text)
    lines = [
        f"# Merging, Qwen3 {args.shape} shapes, base and two fine-tunes, bfloat16",
        "",
        f"`{about['command']}`",
        "",
        f"{about['machine']}; Python {about['python']}, numpy {about['numpy']}. "
        f"{about['gigabytes_moved']} GB moved; CPU seconds net of {imports:.2f} s of imports in "
        "the ratio; fingerprints of all inputs included.",
        "",
        "| method | CPU s | copy CPU s | CPU ratio (limit) | wall s | anonymous GiB (limit) |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        limit = f"{LIMITS[str(r['method'])]:g}" if r["method"] in LIMITS else "none"
        memory = MEMORY_LIMIT.get(args.shape, "none")
        lines.append(
            f"| {r['method']} | {r['cpu_seconds']:.2f} | {r['copy_cpu_seconds']:.2f} | "
            f"{r['cpu_ratio']:.1f} ({limit}) | {r['wall_seconds']:.1f} | "
            f"{r['peak_anonymous_gib']:.2f} ({memory}) |"
        )
    (args.results / f"{name}.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
