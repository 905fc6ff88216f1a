"""What each denoising filter does to the gradient, and to learning, under known noise.

    python experiments/ablate_denoise.py bias                      # 5 min on 2 quiet cores
    python experiments/ablate_denoise.py learn clean --seed 0      # 3 to 5 min each, see LEARNING
    python experiments/ablate_denoise.py report                    # joins what there is

`bias`: groups of the shipped agent after SFT are sampled once; judge flips, lost judges, lost tool
servers and leaks are injected afterwards, so the noise-free gradient of the very same samples is
known. The gradient is MiniRL's at ratio 1, sum_t A_t grad log pi(y_t). 'bias' is the cosine of its
mean over noise draws with the noise-free gradient, 'one draw' that of a single draw (bias and
variance), 'kept' the part of the noise-free gradient that is left along it; 95 % intervals from a
bootstrap over groups. Truncated pages change what the agent does next, so there other episodes are
compared, and the cosine is corrected for sampling noise by halves.

`learn`: a short RL run per kind of noise, filters on and off; scored by the true verdicts of what
the policy samples, which training does not see.

Writes experiments/results/ablate_denoise.{json,md,svg}.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
RESULTS = ROOT / "experiments" / "results"

import jax
import numpy as np
from denoise_bias import measure_bias
from denoise_learning import LEARNING, learn

from agentcpm_jax.evaluate.passk import Estimate
from agentcpm_jax.evaluate.report.charts import bar_chart, line_chart


def main() -> None:
    """One part of the study; parts add up in the JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("bias", "learn", "report"))
    parser.add_argument("run", nargs="?", choices=sorted(LEARNING))
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path = RESULTS / "ablate_denoise.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    started = time.process_time()
    if args.part == "bias":
        found["bias"] = measure_bias(args.groups, args.draws, args.seed) | origin(started)
    elif args.part == "learn":
        if args.run is None:
            parser.error(f"name a run: {', '.join(LEARNING)}")
        result = learn(args.run, args.steps, args.seed) | origin(started)
        found.setdefault("learn", {})[f"{args.run}, seed {args.seed}"] = result
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "ablate_denoise.md").write_text(tables(found))
    (RESULTS / "ablate_denoise.svg").write_text(charts(found))
    print(tables(found))


def origin(started: float) -> dict[str, object]:
    """Where a result comes from."""
    return {
        "command": "python " + " ".join(["experiments/ablate_denoise.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {platform.system()}, jax {jax.__version__} on CPU",
        "cpu_seconds": round(time.process_time() - started),
    }


def tables(found: dict) -> str:
    """Both parts as markdown."""
    out = ["# Denoising filters under known noise", ""]
    if bias := found.get("bias"):
        out += [
            f"`{bias['command']}`: {bias['groups']} groups of 8, accuracy "
            f"{bias['accuracy']:.2f}, {bias['with_signal']} groups with signal; {bias['draws']} "
            f"noise draws; {bias['machine']}, {bias['cpu_seconds']} CPU s.",
            "",
            "| noise | rule | bias (cosine) | one draw (cosine) | kept |",
            "|---|---|---|---|---|",
        ]
        out += [
            f"| {r['noise']} | {r['rule']} | {_cell(r['bias'])} | {_cell(r['one'])} | "
            f"{_cell(r['kept'])} |"
            for r in bias["rows"]
        ]
        for note in bias["notes"]:
            out += ["", note]
    if runs := found.get("learn"):
        out += [
            "",
            "## Learning",
            "",
            "Sixteen steps of 64 samples. 'tested': the resulting policy on 96 held-out questions "
            "in worlds without noise, four episodes each, seeds together; 'own episodes': the true "
            "verdicts of what training sampled last, without lost episodes, so not comparable "
            "between kinds of noise. 95 % bootstrap intervals over questions or groups.",
            "",
            "| noise | filters | tested | by seed | own episodes, last steps | groups dropped |",
            "|---|---|---|---|---|---|",
        ]
        for name in LEARNING:
            found = [r for key, r in sorted(runs.items()) if key.startswith(name + ",")]
            if found:
                out.append(_learning_row(name, found))
    return "\n".join(out) + "\n"


def _learning_row(name: str, runs: list[dict]) -> str:
    means = [np.array(r["tested"]) for r in runs]
    mean = np.mean([m[0] for m in means])
    half = np.sqrt(sum(((m[2] - m[1]) / 2) ** 2 for m in means)) / len(means)
    seeds = ", ".join(f"{m[0]:.3f}" for m in means)
    last = ", ".join(f"{r['last'][0]:.3f}" for r in runs if r["steps"])
    dropped = ", ".join(str(r["dropped"]) for r in runs if r["steps"])
    noise, filters = runs[0]["noise"], runs[0]["filters"]
    if name == "untrained":
        noise, filters = "before training", ""
    tested = f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"
    return f"| {noise} | {filters} | {tested} | {seeds} | {last} | {dropped} |"


def charts(found: dict) -> str:
    """One SVG: bias per rule, and learning curves."""
    parts: list[tuple[str, int]] = []
    if bias := found.get("bias"):
        rows = [r for r in bias["rows"] if r["noise"] != "none"]
        for noise in dict.fromkeys(r["noise"] for r in rows):
            own = [r for r in rows if r["noise"] == noise]
            series = {
                "bias": [Estimate(*r["bias"]) for r in own],
                "one draw": [Estimate(*r["one"]) for r in own],
            }
            title = f"Cosine to the noise-free gradient: {noise}"
            parts.append((bar_chart([r["rule"] for r in own], series, title, percent=False), 270))
    if runs := found.get("learn"):
        curves: dict[str, list[tuple[float, float]]] = {}
        for name in LEARNING:
            seeds = [dict(r["curve"]) for key, r in runs.items() if key.startswith(name + ",")]
            versions = sorted(set.intersection(*map(set, seeds))) if seeds else []
            if versions:
                curves[name] = [(v, sum(c[v] for c in seeds) / len(seeds)) for v in versions]
        chart = line_chart(
            curves,
            "True accuracy of sampled episodes, mean of seeds",
            smooth=False,
            width=700,
            height=330,
        )
        parts.append((chart, 330))
    placed, top = [], 0
    for svg, height in parts:
        placed.append(svg.replace("<svg ", f'<svg y="{top}" ', 1))
        top += height + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{max(top, 10)}" '
        f'viewBox="0 0 700 {max(top, 10)}">\n' + "\n".join(placed) + "\n</svg>\n"
    )


def _cell(value: list[float]) -> str:
    middle, low, high = value
    if middle != middle:
        return "undefined"
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]" if low == low else f"{middle:.3f}"


if __name__ == "__main__":
    main()
